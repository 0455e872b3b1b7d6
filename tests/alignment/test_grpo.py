"""GRPO end to end: a tiny policy learns, a killed run resumes, eight devices equal one."""

import dataclasses
import json
import shutil
import types

import jax
import numpy as np
import pytest

from configs import pretrain
from dsv2_jax import loading, train
from dsv2_jax.alignment import grpo, policy
from dsv2_jax.alignment.sampler import rewarded
from dsv2_jax.alignment.samples import Sample, arrays, mixed
from dsv2_jax.config import Batch, Cadence, Compute, Data, Grpo, Mesh, Moe, Optimizer
from dsv2_jax.data import chat, corpora
from dsv2_jax.inference.request import Result
from dsv2_jax.model import transformer
from dsv2_jax.parallel import mesh as device_mesh
from dsv2_jax.parallel import sharding
from dsv2_jax.training import checkpoint, loop, metrics
from dsv2_jax.training.checkpoint import Progress
from dsv2_jax.training.step import create, state_specs

EIGHT = Mesh(fsdp=4, expert=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model that has seen a little text, and the settings of GRPO on it: be brief."""
    folder = tmp_path_factory.mktemp("grpo")
    (folder / "text.txt").write_text("\n".join(f"User: pick {n}\n\nAssistant: {n % 10}" for n in range(900)))
    with (folder / "prompts.jsonl").open("w") as file:
        for n in range(60):
            file.write(json.dumps({"prompt": f"pick {n}", "most_characters": 4}) + "\n")
    tiny = pretrain.tiny()
    moe = dataclasses.replace(tiny.model.moe, budget_sequences=1)
    tiny = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, moe=moe))
    data = Data(source=str(folder / "text.txt"), folder=folder / "data")
    train.train(
        dataclasses.replace(
            tiny, workdir=folder / "base", tokens=30 * 8 * 32, data=data, batch=Batch(size=8, length=32)
        )
    )
    return dataclasses.replace(
        tiny,
        init=folder / "base",
        workdir=folder / "run",
        tokens=0,
        data=Data(source=str(folder / "prompts.jsonl"), form="prompts", folder=folder / "data", held_out_fraction=0.2),
        batch=Batch(size=32, length=40),
        optimizer=Optimizer(peak_lr=1e-3, warmup_steps=0, decay_at=(), weight_decay=0.0),
        compute=Compute(dtype="float32", remat="none", loss_chunk=256),
        cadence=Cadence(log=1, evaluate=6, save=6),
        mesh=EIGHT,
        grpo=Grpo(group=8, prompts=8, passes=1, steps=12, max_new=4, rewards=("brevity",), replay=True),
    )


@pytest.fixture(scope="module")
def whole(base):
    return grpo.train(base), metrics.read(base.workdir)


@pytest.mark.slow
def test_the_policy_learns_what_is_rewarded(whole):
    outcome, lines = whole
    assert outcome.finished and outcome.progress.step == 12
    held_out = [line["held_out_reward"] for line in lines if "held_out_reward" in line]
    assert held_out[-1] > held_out[0] + 0.3
    steps = [line for line in lines if "objective" in line]
    assert len(steps) == 12
    assert abs(steps[0]["kl"]) < 1e-6 < steps[-1]["kl"]
    for name in ("entropy", "clipped", "reward_brevity", "groups_without_signal", "response_tokens", "expert_balance"):
        assert all(name in line for line in steps)


@pytest.mark.slow
def test_sampler_and_trainer_agree_on_log_probabilities(whole):
    _, lines = whole
    steps = [line for line in lines if "sampler_gap_max" in line]
    assert max(line["sampler_gap_max"] for line in steps) < 1e-4
    assert {line["router_disagreement"] for line in steps} == {0}
    assert max(abs(line["importance"] - 1) for line in steps) < 1e-4


@pytest.mark.slow
def test_a_run_leaves_a_picture_and_its_held_out_answers(base, whole):
    assert (base.workdir / "plots" / "grpo.png").stat().st_size > 10_000
    answers = [json.loads(line) for line in (base.workdir / "held_out.jsonl").read_text().splitlines()]
    assert {line["step"] for line in answers} == {0, 6, 12}
    assert len({line["prompt"] for line in answers}) == len(answers) // 3
    learnt = {json.loads(line)["prompt"] for line in (base.workdir / "samples.jsonl").read_text().splitlines()}
    assert not learnt & {line["prompt"] for line in answers}
    assert whole[0].held_out["held_out_reward"] == pytest.approx(
        np.mean([line["rewards"]["brevity"] for line in answers if line["step"] == 12])
    )


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_bit_for_bit(base, whole, tmp_path):
    """The first half with its optimizer state on the host while it samples; and its init then gains a newer step,
    which is not what the policy is to stay close to."""
    undisturbed = base.workdir
    growing = shutil.copytree(base.init, tmp_path / "growing")
    base = dataclasses.replace(base, workdir=tmp_path / "run", init=growing)
    grpo.train(dataclasses.replace(base, grpo=dataclasses.replace(base.grpo, steps=6, offload=True)))
    init, params = checkpoint.restore_params(growing)
    checkpoint.save_params(growing, init, jax.tree.map(lambda w: 1.1 * w, params), step=1000)
    grpo.train(base)
    clock = ("tokens_per_second", "mfu", "sampled_tokens_per_second", "seconds_sampling", "seconds_rewarding")

    def lasting(lines):
        figures = [{k: v for k, v in line.items() if k not in clock} for line in lines]
        return [line for line in figures if "seconds_updating" not in line and line["step"] > 6]

    assert lasting(metrics.read(tmp_path / "run")) == lasting(whole[1])
    names = [run / "samples.jsonl" for run in (base.workdir, undisturbed)]
    assert names[0].read_text() == names[1].read_text()


def test_arrays_by_hand():
    grpo = Grpo(group=2, prompts=2, rewards=("form", "brevity"), weights=(1.0, 0.1))
    config = dataclasses.replace(pretrain.tiny(), grpo=grpo)
    rewards = {"form": 1.0, "brevity": 0.5}
    good = Sample(item={}, prompt=(5, 6), answer=(7, 8, 1), logprobs=(-1.0, -2.0, -3.0), text="", rewards=rewards)
    bad = dataclasses.replace(good, answer=(9,), logprobs=(-4.0,), rewards={"form": 0.0, "brevity": 0.5})
    rows, figures = arrays([good, bad], config)
    assert rows["tokens_BT"][:, :5].tolist() == [[5, 6, 7, 8, 0], [5, 6, 0, 0, 0]]
    assert rows["targets_BT"][:, :5].tolist() == [[6, 7, 8, 1, 0], [6, 9, 0, 0, 0]]
    np.testing.assert_allclose(rows["weights_BT"][:, :5], [[0, 1 / 3, 1 / 3, 1 / 3, 0], [0, 1, 0, 0, 0]])
    assert rows["sampler_BT"][:, :5].tolist() == [[0, -1, -2, -3, 0], [0, -4, 0, 0, 0]]
    np.testing.assert_allclose(rows["advantages_BT"][:, 0], [1, -1], rtol=1e-6)
    assert figures["reward"] == pytest.approx(0.55) and figures["groups_without_signal"] == 0


@pytest.mark.parametrize(
    ("unfinished", "rewards", "advantages", "kept"),
    [
        ("keep", [0.25, 1.0, 0.625], [-1, 1, 0], None),
        ("mask", [0.25, 1.0, 0.625], [-1, 1, 0], [1, 0, 1]),  # a masked one still counts in its group
        ("penalize", [0.25, 0.5, 0.625], [-1.336, 0.267, 1.069], None),
    ],
)
def test_unfinished_responses_by_hand(unfinished, rewards, advantages, kept):
    """A group of three; max_new truncates the second, which has the best reward. Normalised over the group."""
    settings = Grpo(
        group=3, prompts=1, rewards=("form", "brevity"), weights=(1.0, 0.25), unfinished=unfinished, penalty=0.5
    )
    config = dataclasses.replace(pretrain.tiny(), batch=Batch(size=3, length=32), grpo=settings)
    one = Sample(
        item={}, prompt=(5, 6), answer=(7, 1), logprobs=(-1.0, -2.0), text="", rewards={"form": 0.0, "brevity": 1.0}
    )
    cut = dataclasses.replace(one, answer=(8, 9), rewards={"form": 1.0, "brevity": 0.0}, finished=False)
    middle = dataclasses.replace(one, rewards={"form": 0.5, "brevity": 0.5})
    assert [mixed(sample, settings) for sample in (one, cut, middle)] == rewards
    rows, figures = arrays([one, cut, middle], config)
    np.testing.assert_allclose(
        rows["advantages_BT"][:, 0], np.array(advantages) * (1 if unfinished == "penalize" else 1.2247), atol=1e-3
    )
    assert figures["unfinished"] == pytest.approx(1 / 3)
    assert figures["reward"] == pytest.approx(np.mean(rewards))
    assert ("kept_BT" in rows) == (kept is not None)
    if kept:
        assert (rows["kept_BT"] == np.array(kept)[:, None]).all()


def test_a_reward_model_reads_every_response_at_an_end_of_sequence():
    """One that max_new cut as if it had ended at its last token; the rewards of a text read it as it is."""
    read, texts = [], []

    def judge(sequences):
        read.extend(sequences)
        return np.arange(len(sequences), dtype=np.float32)

    def pool(_items, found):
        texts.extend(found)
        return {"form": np.full(len(found), 0.5)}

    tokenizer = types.SimpleNamespace(eos_id=1, decode=lambda ids: "".join(map(str, ids)))
    ended = Result(tokens=(7, 1), logprobs=(-1.0,) * 2, top=(), text="", reason="stop", scores=(), reused=0)
    cut = dataclasses.replace(ended, tokens=(7, 8, 9), logprobs=(-1.0,) * 3, reason="length")
    first, second = rewarded([({}, (5, 6))] * 2, [ended, cut], tokenizer, pool, {"judge": judge}, ("judge", "form"))
    assert read == [(5, 6, 7, 1), (5, 6, 7, 8, 1)] and texts == ["7", "789"]
    assert (first.finished, second.finished, second.answer) == (True, False, (7, 8, 9))
    assert second.rewards == {"judge": 1.0, "form": 0.5}


def test_a_masked_response_has_no_loss():
    """With one of three responses masked the loss is two thirds of the mean of the other two, as in TRL."""
    dense = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "moe": Moe(n_routed_experts=0)}
    model = dataclasses.replace(pretrain.tiny().model, **dense)  # without experts no balance losses
    config = dataclasses.replace(
        pretrain.tiny(), model=model, batch=Batch(size=3, length=8), mesh=Mesh(fsdp=1),
        compute=Compute(dtype="float32", remat="none", loss_chunk=8), grpo=Grpo(group=3, prompts=1, unfinished="mask"),
    )  # fmt: skip
    answers = ((7, 1), (8, 9, 4), (3, 1))
    samples = [
        Sample(
            item={}, prompt=(5, 6), answer=answer, logprobs=(-5.0,) * len(answer), text="",
            rewards={"task": float(n)}, finished=answer[-1] == 1,
        )
        for n, answer in enumerate(answers)
    ]  # fmt: skip
    rows, _ = arrays(samples, config)
    rows |= {"old_BT": rows["sampler_BT"] - 0.1, "reference_BT": rows["sampler_BT"] + 0.2}
    params = transformer.init(model, jax.random.key(0))

    @jax.jit
    def gradients(params, batch):
        return jax.value_and_grad(policy.loss, has_aux=True)(
            params, batch, config=config, exempt_B=None, total_weight=batch["weights_BT"].sum(), share=1.0
        )

    (masked, _), of_masked = gradients(params, rows)
    others = {name: leaf[[0, 2, 2]] for name, leaf in rows.items()}
    others["weights_BT"][2] = 0  # and no response at all in the place of the masked one
    (alone, _), of_others = gradients(params, others)
    assert float(masked) == pytest.approx(2 / 3 * float(alone), rel=1e-5)
    for a, b in zip(jax.tree.leaves(of_masked), jax.tree.leaves(of_others), strict=True):
        np.testing.assert_allclose(a, 2 / 3 * b, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("replay", [False, True])
def test_eight_devices_make_the_update_of_one(base, replay):
    """From the first samples of the run. Replayed experts are random: two complete groups for each token."""
    # As in the test of layouts: at 1e-8 AdamW makes steps of pure rounding where a gradient is zero but for it.
    adamw = dataclasses.replace(base.optimizer, epsilon=1e-4)
    replayed = dataclasses.replace(base.grpo, replay=replay)
    config = loop.resolve(dataclasses.replace(base, optimizer=adamw, grpo=replayed))
    rng = np.random.default_rng(0)
    words = loading.tokenizer_for(config, corpora.prepare(config.data))
    lines = [json.loads(line) for line in (base.workdir / "samples.jsonl").read_text().splitlines()]
    samples = []
    for line in [line for line in lines if line["step"] == 0]:
        prompt = chat.encode([{"role": "user", "content": line["prompt"]}], words, generation=True).ids
        answer = tuple(words.encode(line["response"])) or (words.eos_id,)
        drawn = tuple(-2.0 - 0.1 * i for i in range(len(answer)))
        tokens = len(prompt) + len(answer) - 1
        groups = rng.permuted(np.tile(np.arange(8), (tokens, 2, 1)), axis=-1)[..., :2]
        experts = np.stack([2 * groups, 2 * groups + 1], -1).reshape(tokens, 2, 4)
        samples.append(
            Sample(
                item={}, prompt=tuple(prompt.tolist()), answer=answer, logprobs=drawn, text="",
                rewards=line["rewards"], experts=experts,
            )
        )  # fmt: skip
    after = []
    for sizes, devices in ((Mesh(fsdp=1), jax.devices()[:1]), (EIGHT, jax.devices())):
        here = dataclasses.replace(config, mesh=sizes)
        mesh = device_mesh.make(sizes, devices)
        shardings = sharding.on(mesh, state_specs(here))
        params, reference = (
            jax.device_put(jax.device_get(loading.load(base.init).params), shardings.params) for _ in range(2)
        )
        state = jax.jit(lambda p, here=here: create(p, here), out_shardings=shardings)(params)
        log = _NoLog()
        state, _ = grpo.update(here, mesh, state, reference, samples, Progress(), {}, log)
        after.append((jax.device_get(state.params), log.lines))
    (one, lines_of_one), (eight, lines_of_eight) = after
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max())
    for a, b in zip(lines_of_one, lines_of_eight, strict=True):
        for name in ("objective", "kl", "clipped", "entropy", "grad_norm", "expert_balance"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-7, err_msg=name)


class _NoLog:
    """Keeps what `update` records."""

    def __init__(self):
        self.lines = []

    def record(self, _progress, _lr, figures):
        self.lines.append(jax.device_get(figures))

    def flush(self):
        pass

    def figures(self, _progress, _figures):
        pass
