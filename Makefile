# make demo: train, evaluate, sample and export a small DeepSeek-V2.   make align: fine-tune it and train it by GRPO.
# make eval: every evaluation.   make wheel: dist/*.whl, for other machines.
# For developers: make test, make prove, make lint, make docs (the website, in site/).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV ?= .venv
PROMPT ?= To be, or not to be

PY := $(VENV)/bin/python
RUN := runs/demo
CHECKPOINT ?= $(RUN)
REPORT ?= runs/eval
LIMIT ?= 100
NEEDLES ?= 128 256 500
ANSWER ?= 128
OWN := offline_boolq,offline_openbookqa,offline_commonsenseqa,offline_truthfulqa_100
CHINESE := offline_chengyu_meaning,offline_chengyu_cloze

.PHONY: demo align eval wheel docs test prove lint

demo: $(VENV)/.installed
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(PY) train.py nano --workdir $(RUN)
	$(PY) eval.py --checkpoint $(RUN) --json $(RUN)/eval.json
	$(PY) -m dsv2_jax.generate --checkpoint $(RUN) --prompt "$(PROMPT)" | tee $(RUN)/sample.txt
	rm -rf $(RUN)/hf
	$(PY) -m dsv2_jax.hf export --checkpoint $(RUN) --out $(RUN)/hf
	$(PY) scripts/demo_figure.py $(RUN)
	@echo
	@echo "corpus, tokenizer  data/  (notices of the texts: data/corpora/*/notices)"
	@echo "checkpoints        $(RUN)/checkpoints"
	@echo "metrics            $(RUN)/metrics.jsonl  (for TensorBoard: $(RUN)/tensorboard)"
	@echo "plots              $(RUN)/plots  (demo.png: the loss, and the sample under it)"
	@echo "held-out figures   $(RUN)/eval.json"
	@echo "sample             $(RUN)/sample.txt"
	@echo "Hugging Face       $(RUN)/hf  (transformers.AutoModelForCausalLM.from_pretrained reads it)"

align: $(VENV)/.installed
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(PY) -m dsv2_jax.alignment --base $(RUN) --workdir runs/align

# Needs no network once the sets are in data/evaluation. LIMIT documents of each, answers of ANSWER tokens; both, and
# NEEDLES, are sized for nano. The report says what is left out.
eval: $(VENV)/.installed
	mkdir -p $(REPORT)
	$(PY) eval.py --checkpoint $(CHECKPOINT) --tasks deepseek_v2_base,$(OWN),$(CHINESE) --offline --limit $(LIMIT) --max-gen-toks $(ANSWER) \
	  --needle --haystack.lengths $(NEEDLES) --haystack.picture $(REPORT)/needle.png --samples $(REPORT)/samples \
	  --json $(REPORT)/eval.json --page $(REPORT)/eval.html

# Deletes earlier builds first, or the wheel would contain files that the tree no longer has.
wheel:
	rm -rf build dist
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

# The tests of a file run in one worker: they share its fixtures and its compiled programs.
test: $(VENV)/.installed-dev
	$(PY) -m pytest -n 2 --dist loadfile -m "not slow and not tpu"

prove: $(VENV)/.installed-dev
	$(PY) -m pytest -n 2 --dist loadfile -m "slow or tpu"

lint: $(VENV)/.installed-dev
	$(PY) -m ruff format --check
	$(PY) -m ruff check
	$(PY) -m pyright --pythonpath $(PY)

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

# One pip call: torch is pinned there, and all packages that need torch must accept that version.
$(VENV)/.installed-dev: requirements-dev.txt requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@ $(VENV)/.installed
