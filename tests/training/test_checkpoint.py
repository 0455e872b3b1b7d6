"""The newest checkpoint is restored bit for bit; a run continues only with its original settings."""

import dataclasses
import json
import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import PRESETS
from dsv2_jax import loading, parameters
from dsv2_jax.config import Cadence, Compute, Data, Mesh, Optimizer, to_json
from dsv2_jax.parallel import mesh as device_mesh
from dsv2_jax.parallel import sharding
from dsv2_jax.training import checkpoint, integrity, run_folder
from dsv2_jax.training.checkpoint import Checkpoints, Progress
from dsv2_jax.training.step import create


@pytest.fixture
def config(tmp_path):
    return dataclasses.replace(PRESETS["tiny"](), workdir=tmp_path / "run")


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = parameters.tree(config.model)
    return {
        part: {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in named.items()}
        for part, named in shapes.items()
    }


def numbers():
    return iter(grain.MapDataset.range(1000).shuffle(seed=3).to_iter_dataset())


HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def restore(checkpoints, config, batches, seed=0):
    def initial():
        return create(random_params(config, seed), config)

    return checkpoints.restore(initial, batches, jax.tree.map(lambda _: HERE, jax.eval_shape(initial)))


def test_state_data_and_progress_come_back(config):
    state = create(random_params(config), config)
    state = state._replace(optimizer=jax.tree.map(lambda x: x + 3, state.optimizer))
    kept = jax.tree.map(np.array, state)
    batches = numbers()
    for _ in range(5):
        next(batches)
    following = [next(batches) for _ in range(3)]
    batches = numbers()
    for _ in range(5):
        next(batches)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpoints(config.workdir, 2) as checkpoints:
        checkpoints.save(state, batches, Progress(step=5, tokens=9 * 10**12))
        state = overwrite(overwrite(state))  # the next steps reuse the buffers while the save is under way
        next(batches)
    fresh = numbers()
    with Checkpoints(config.workdir, 2) as checkpoints:
        restored, progress = restore(checkpoints, config, fresh, seed=1)
    assert progress == Progress(step=5, tokens=9 * 10**12)
    assert [next(fresh) for _ in range(3)] == following
    assert int(restored.step) == 5
    jax.tree.map(np.testing.assert_array_equal, tuple(restored[:2]), tuple(kept[:2]))
    assert jax.tree.structure(restored) == jax.tree.structure(kept)


def test_without_a_checkpoint_a_run_begins(config):
    with Checkpoints(config.workdir, 2) as checkpoints:
        state, progress = restore(checkpoints, config, numbers())
    assert progress == Progress() and int(state.step) == 0


def test_the_newest_are_kept_and_leftovers_of_a_kill_are_not_seen(config):
    state = create(random_params(config), config)
    with Checkpoints(config.workdir, 2) as checkpoints:
        for step in (3, 6, 9):
            checkpoints.save(state, numbers(), Progress(step=step))
    folder = config.workdir / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["6", "9"]
    (folder / "12.orbax-checkpoint-tmp").mkdir()
    assert run_folder.latest_step(config.workdir) == 9
    with Checkpoints(config.workdir, 2) as checkpoints:
        _, progress = restore(checkpoints, config, numbers())
    assert progress.step == 9
    assert not (folder / "12.orbax-checkpoint-tmp").exists()


def test_parameters_alone(config):
    params = random_params(config)
    checkpoint.save_params(config.workdir, config, params)
    read, restored = checkpoint.restore_params(config.workdir)
    assert read == config
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    assert restored["moe"]["w_up_EDF"].dtype == jnp.float32
    with pytest.raises(ValueError, match="already holds a checkpoint of step 0"):
        checkpoint.save_params(config.workdir, config, params)
    with Checkpoints(config.workdir, 2) as checkpoints, pytest.raises(ValueError, match="holds parameters only"):
        restore(checkpoints, config, numbers())


def test_missing_runs_are_named(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run in .*nowhere"):
        checkpoint.restore_params(tmp_path / "nowhere")
    run_folder.open_run(config)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*run"):
        checkpoint.restore_params(config.workdir)
    with pytest.raises(FileNotFoundError, match="no parameters of step 7"):
        checkpoint.restore_params(config.workdir, 7)


def test_parameters_that_are_not_the_configs_are_named(config):
    params = random_params(config)
    wide = dataclasses.replace(config, model=dataclasses.replace(config.model, intermediate_size=52))
    with pytest.raises(
        ValueError, match=r"dense\.w_down_ID .* has the shape \(1, 48, 32\), the config says \(1, 52, 32\)"
    ):
        checkpoint.save_params(config.workdir, wide, params)
    checkpoint.save_params(config.workdir, config, params)
    run_folder.write_config(config.workdir, wide)
    with pytest.raises(ValueError, match=r"dense\.w_down_ID"):
        checkpoint.restore_params(config.workdir)


def test_a_run_goes_on_only_with_its_own_settings(config, tmp_path):
    run_folder.open_run(config)
    other_seed = dataclasses.replace(config, seed=5)
    run_folder.open_run(other_seed)  # nothing is trained yet: the run may still be changed
    state = create(random_params(config), config)
    with Checkpoints(config.workdir, 2) as checkpoints:
        checkpoints.save(state, numbers(), Progress(step=1))
    with pytest.raises(ValueError, match=r"seed is 0, but the run in .* was started with 5"):
        run_folder.open_run(config)
    slow = dataclasses.replace(other_seed, optimizer=Optimizer(decay_at=(0.5,)))
    with pytest.raises(ValueError, match=r"optimizer\.peak_lr is 0\.00024, but .* with 0\.01"):
        run_folder.open_run(slow)
    free = dataclasses.replace(
        other_seed,
        tokens=10**6,
        cadence=Cadence(save=2),
        compute=Compute(remat="none"),
        data=Data(fetch=False, folder=tmp_path / "moved"),
    )
    run_folder.open_run(free)
    assert run_folder.read_config(config.workdir) == free
    with pytest.raises(ValueError, match="already holds a run"):
        run_folder.open_run(dataclasses.replace(free, resume=False))


def test_a_tokenizer_cannot_change_under_a_run(config):
    run = config.workdir
    run_folder.open_run(config)
    run_folder.keep_tokenizer(run, lambda folder: (folder / "words").write_text("a"))
    run_folder.keep_tokenizer(run, lambda folder: (folder / "words").write_text("b"))  # nothing is trained yet
    assert (run / "tokenizer" / "words").read_text() == "b"
    checkpoint.save_params(run, config, random_params(config))
    run_folder.keep_tokenizer(run, lambda folder: (folder / "words").write_text("b"))
    with pytest.raises(ValueError, match=r"the tokenizer in .* differs from"):
        run_folder.keep_tokenizer(run, lambda folder: (folder / "words").write_text("c"))
    assert (run / "tokenizer" / "words").read_text() == "b"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with complete checkpoints of steps 3 and 5, to be copied."""
    config = dataclasses.replace(PRESETS["tiny"](), workdir=tmp_path_factory.mktemp("saved") / "run")
    run_folder.open_run(config)
    state = create(random_params(config), config)
    rng = np.random.default_rng(1)
    noise = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state.optimizer)
    with Checkpoints(config.workdir, 2) as checkpoints:
        for step in (3, 5):
            checkpoints.save(state._replace(optimizer=noise), numbers(), Progress(step=step, tokens=77))
    return config


@pytest.fixture
def copied(saved, config):
    shutil.copytree(saved.workdir, config.workdir)
    return config


def flip(path, at, bit):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("item", ["params", "optimizer"])
def test_a_flipped_bit_in_arrays_is_found(copied, item, seed):
    rng = np.random.default_rng(seed)
    path = largest(copied.workdir / "checkpoints" / "5" / item / "ocdbt.process_0" / "d")
    flip(path, rng.integers(path.stat().st_size), rng.integers(8))
    older = r"remove .*checkpoints/5 to use step 3"
    with (
        Checkpoints(copied.workdir, 2) as checkpoints,
        pytest.raises(ValueError, match=rf"the checkpoint of step 5 in .* is damaged: .*w_\w+.*; {older}"),
    ):
        restore(checkpoints, copied, numbers())
    if item == "params":
        with pytest.raises(ValueError, match=rf"step 5 in .* is damaged: .*w_\w+.*; {older}"):
            checkpoint.restore_params(copied.workdir)
    shutil.rmtree(copied.workdir / "checkpoints" / "5")
    with Checkpoints(copied.workdir, 2) as checkpoints:
        assert restore(checkpoints, copied, numbers())[1] == Progress(step=3, tokens=77)


@pytest.mark.parametrize(
    ("name", "before", "after", "told"),
    [
        ("progress/metadata", "77", "79", "progress is not what was saved"),
        ("data/metadata", ": 0", ": 1", "data is not what was saved"),
        ("data/metadata", "{", "(", "is damaged: JSONDecodeError"),
        ("checksums/metadata", ": 1", ": 2", "is not what was saved"),
        ("checksums/metadata", "{", "[", "is damaged: JSONDecodeError"),
        ("params/_METADATA", "key_type", "kez_type", "is damaged: KeyError"),
    ],
)
def test_other_damage_is_one_line(copied, name, before, after, told):
    path = copied.workdir / "checkpoints" / "5" / name
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after, 1))
    with Checkpoints(copied.workdir, 2) as checkpoints, pytest.raises(ValueError, match=told) as caught:
        restore(checkpoints, copied, numbers())
    assert "\n" not in str(caught.value)


def test_an_older_checkpoint_has_no_checksums_and_says_so(copied, capsys):
    shutil.rmtree(copied.workdir / "checkpoints" / "5" / "checksums")
    with Checkpoints(copied.workdir, 2) as checkpoints:
        state, progress = restore(checkpoints, copied, numbers())
    assert "step 5 in" in (told := capsys.readouterr().err) and "saved without checksums and is not checked" in told
    _, params = checkpoint.restore_params(copied.workdir)
    assert progress.step == 5
    jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_only_whole_steps_count(copied, capsys):
    run = copied.workdir
    (run / "checkpoints" / "99").mkdir()
    (run / "checkpoints" / "7").mkdir()
    (run / "checkpoints" / "7" / "_CHECKPOINT_METADATA").write_text("{}")
    assert run_folder.latest_step(run) == 5
    run_folder.open_run(copied)
    assert "checkpoints/99 is an incomplete checkpoint; renamed to 99.unfinished" in capsys.readouterr().err
    with Checkpoints(run, 2) as checkpoints:
        state, progress = restore(checkpoints, copied, numbers())
        assert progress.step == 5
        checkpoints.save(state, numbers(), Progress(step=9))
    assert run_folder.complete_steps(run) == [5, 9]
    assert (run / "checkpoints" / "7.unfinished" / "_CHECKPOINT_METADATA").exists()


def test_lost_checkpoints_are_not_begun_anew(copied):
    run, metrics = copied.workdir, copied.workdir / "metrics.jsonl"
    line = json.dumps({"step": 5}) + "\n"
    metrics.write_text(line)
    (run / "checkpoints").rename(run / "elsewhere")
    with pytest.raises(ValueError, match=r"checkpoints is missing, but .*metrics.jsonl belongs to a run; put it back"):
        run_folder.open_run(copied)
    (run / "checkpoints" / "5").mkdir(parents=True)  # as a copy that was cut short leaves it
    with pytest.raises(ValueError, match=r"incomplete checkpoints .*/5, and .* has no complete one; put it back"):
        run_folder.open_run(copied)
    assert metrics.read_text() == line and (run / "checkpoints" / "5").exists()
    shutil.rmtree(run / "checkpoints")
    (run / "elsewhere").rename(run / "checkpoints")
    run_folder.open_run(copied)


def test_a_run_killed_before_its_first_checkpoint_begins_anew(config):
    run_folder.open_run(config)
    with Checkpoints(config.workdir, 2):
        (config.workdir / "metrics.jsonl").write_text('{"step": 1}\n')  # killed here, or during the first save
    (config.workdir / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
    run_folder.open_run(config)
    with Checkpoints(config.workdir, 2) as checkpoints:
        assert restore(checkpoints, config, numbers())[1] == Progress()


def test_an_old_run_that_knew_fewer_settings_goes_on(config):
    """Its missing settings were what their defaults are now: those go on, others are refused with both values."""
    run_folder.open_run(config)
    checkpoint.save_params(config.workdir, config, random_params(config))
    path = config.workdir / "config.json"
    old = json.loads(path.read_text())
    del old["grpo"], old["data"]["retrieval_share"], old["model"]["moe"]["budget_sequences"]
    path.write_text(json.dumps(old))
    assert checkpoint.restore_params(config.workdir)[0] == config
    asks = dataclasses.replace(config, data=dataclasses.replace(config.data, retrieval_share=0.5))
    with pytest.raises(ValueError, match=r"data\.retrieval_share is 0\.5, but the run in .* was started with 0\.0"):
        run_folder.open_run(asks)
    run_folder.open_run(config)
    assert json.loads(path.read_text()) == json.loads(to_json(config))


def test_an_init_that_grows_stays_the_step_that_the_run_began_with(config, tmp_path):
    """Newer steps of the init are not read; another init, and another checkpoint under the same name, are refused."""
    base = dataclasses.replace(config, workdir=tmp_path / "base")
    first, second = random_params(config), random_params(config, seed=1)
    checkpoint.save_params(base.workdir, base, first, step=7)
    opened = run_folder.open_run(dataclasses.replace(config, init=base.workdir))
    assert opened.init == base.workdir / "checkpoints" / "7"
    jax.tree.map(np.testing.assert_array_equal, loading.start_params(opened, None), first)
    checkpoint.save_params(config.workdir, opened, second, step=3)  # the run has come as far as this

    checkpoint.save_params(base.workdir, base, second, step=9)
    for init in (base.workdir, base.workdir / "checkpoints" / "7", None):
        again = run_folder.open_run(dataclasses.replace(config, init=init))
        assert again == opened == run_folder.read_config(config.workdir)
        jax.tree.map(np.testing.assert_array_equal, loading.start_params(again, None), first)

    for other in (base.workdir / "checkpoints" / "9", tmp_path):
        with pytest.raises(
            ValueError, match=r"--init is .*, but the run in .* started from .*checkpoints/7; drop --init"
        ):
            run_folder.open_run(dataclasses.replace(config, init=other))
    shutil.rmtree(base.workdir / "checkpoints")
    checkpoint.save_params(base.workdir, base, second, step=7)
    with pytest.raises(ValueError, match="checkpoints/7 no longer holds the parameters that the run in"):
        loading.start_params(again, None)


def test_a_run_of_random_parameters_takes_no_init_later(config, tmp_path):
    run_folder.open_run(config)
    checkpoint.save_params(config.workdir, config, random_params(config))
    with pytest.raises(ValueError, match="started from random parameters"):
        run_folder.open_run(dataclasses.replace(config, init=tmp_path))


def test_a_digest_sees_one_bit_and_no_layout(config):
    params = random_params(config)
    mesh = device_mesh.make(Mesh(fsdp=4, expert=2))
    laid_out = jax.device_put(params, sharding.on(mesh, sharding.param_specs(config.model, Mesh(fsdp=4, expert=2))))
    assert integrity.digest(params) == integrity.digest(laid_out)
    norm = np.array(params["head"]["norm_D"])
    norm[3] = np.nextafter(norm[3], np.float32(9))
    changed = params | {"head": params["head"] | {"norm_D": jnp.asarray(norm)}}
    assert integrity.digest(changed) != integrity.digest(params)
