"""Other ways to run a model's networks: the same function, the same images, chosen by measurement and told."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_families import TINY, family_of, pictures, untrained
from torch import Tensor, nn

from models import _checkpoint, _modes, _onnx
from models._modes import Canonical, NotApplicable, called, example_draws, twin
from models._protocol import Model
from service import modes
from service.engine import Engine
from service.execution import Execution, Favour, Precision, execution_in, modes_in, precisions_in
from service.loader import Found, Loaded, weigh
from service.messages import Completed, Failed, Generate, ImageDone, Message, Scored, ScoreImages
from service.modes import Modes, Renewed
from service.residency import Residency
from training.__main__ import main


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    with torch.no_grad():
        made = untrained("ddpm")
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made.eval().requires_grad_(False)


@torch.inference_mode()
def images(model: Model, n: int = 5, steps: int = 6) -> Tensor:
    rows = model.init(example_draws(model.spec, n, steps))
    while int(rows.left.max()) > 0:
        rows = model.step(rows)
    return model.image(rows)


def halved(network: nn.Module) -> Callable[..., Any]:
    return lambda *args: 0.5 * network(*args)


# ---------------------------------------------------------------------------------------------------------------- twins


def test_a_step_tells_which_networks_it_calls_and_with_what(model: Model) -> None:
    (name,) = found = called(model)
    assert name == "network"
    assert [a.shape[0] for a in found[name]] == [4, 4, 4], "two rows and their unconditional halves, filled up"
    with pytest.raises(NotApplicable, match="none of its networks"):
        called(untrained("gaussian").eval().requires_grad_(False))


def test_a_twin_shares_all_and_runs_something_else(model: Model) -> None:
    other = twin(model, {"network": halved(model.networks()["network"])})
    assert other.spec is model.spec
    assert not torch.equal(images(other), images(model))
    same = twin(model, {"network": model.networks()["network"]})
    assert torch.equal(images(same), images(model))
    assert {id(p) for p in other.parameters()} == {id(p) for p in model.parameters()}
    assert type(other) is type(model)
    assert called(model).keys() == {"network"}, "the model itself is as it was"


@pytest.mark.parametrize("case", ["gan", "gan:style", "vae", "flow_matching"])
def test_any_family_runs_as_a_twin(case: str) -> None:
    original = untrained(case).eval().requires_grad_(False)
    with torch.no_grad():
        networks = called(original)
    runs: list[str] = []

    def counting(name: str) -> Callable[..., Any]:
        network = original.networks()[name]
        return lambda *args: (runs.append(name), network(*args))[1]

    other = twin(original, {name: counting(name) for name in networks})
    assert torch.equal(images(other, n=3), images(original, n=3))
    assert set(runs) == set(networks)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 9, 19])
def test_batches_of_any_length_are_called_in_a_few_sizes(rows: int) -> None:
    seen = []

    def square(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(x))
        return x * x, x + y

    x, y = torch.arange(float(rows))[:, None], torch.ones(rows, 1)
    out = Canonical(square, (8, 4))(x, y)
    assert torch.equal(out[0], x * x)
    assert torch.equal(out[1], x + 1)
    assert set(seen) <= {4, 8}
    assert sum(seen) - rows < 8


@torch.inference_mode()
def test_channels_last_is_the_same_function(model: Model) -> None:
    network = model.networks()["network"]
    other, args = _modes.ChannelsLast(network), called(model)["network"]
    torch.testing.assert_close(other(*args), network(*args), rtol=1e-4, atol=1e-5)
    assert other(*args).is_contiguous()
    assert all(p.is_contiguous() for p in network.parameters()), "the model's own weights stay as they are"


@torch.inference_mode()
def test_bfloat16_takes_and_gives_float32(model: Model) -> None:
    network, args = model.networks()["network"], called(model)["network"]
    low = _modes.Autocast(network, model.device)(*args)
    assert low.dtype == torch.float32
    assert not torch.equal(low, network(*args))
    torch.testing.assert_close(low, network(*args), rtol=0.1, atol=0.1)


def test_graphs_need_cuda(model: Model) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    with pytest.raises(NotApplicable, match="CUDA"):
        _modes.graphed(model.networks()["network"], (4,), called(model)["network"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@torch.inference_mode()
def test_cuda_graphs_are_the_same_function(model: Model) -> None:
    on_device = untrained("ddpm").eval().requires_grad_(False).cuda()
    network, args = on_device.networks()["network"], called(on_device)["network"]
    recorded = _modes.graphed(network, (4, 8), args)
    for rows in (1, 4, 7, 13):
        batch = tuple(torch.cat([a] * 4)[:rows] for a in args)
        torch.testing.assert_close(recorded(*batch), Canonical(network, (4, 8))(*batch), rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------- ONNX


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, model: Model) -> Path:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("zoo") / "chain"
    _checkpoint.save(folder, model, family_of("ddpm").Config(**TINY["ddpm"][0]), {"metrics": {}})
    assert main(["export", str(folder)]) == 0
    return folder


@pytest.mark.slow
@torch.inference_mode()
def test_an_exported_network_is_the_same_function_for_any_batch(exported: Path, model: Model) -> None:
    run = _onnx.session(exported, "network", torch.device("cpu"), threads=1)
    network, args = model.networks()["network"], called(model)["network"]
    for rows in (1, 2, 5, 16):
        batch = tuple(torch.cat([a] * 4)[:rows] for a in args)
        torch.testing.assert_close(run(*batch), network(*batch), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_exported_file_that_was_changed_is_not_run(exported: Path, model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "chain"
    folder.mkdir()
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "network.onnx").write_bytes(b"something else")
    warm = Modes(Engine(lambda *_: None, max_rows=8).warm, tmp_path, ("onnx",), max_rows=8).warm("chain", model)
    assert "sha256" in warm.execution.not_chosen["onnx"]
    assert warm.execution.mode == "eager"


# ------------------------------------------------------------------------------------------------------------- choosing


def test_what_calls_no_network_cannot_be_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gaussian = untrained("gaussian").eval().requires_grad_(False)
    _checkpoint.save(tmp_path / "m", gaussian, family_of("gaussian").Config(), {"metrics": {}})
    assert main(["export", str(tmp_path / "m")]) == 2
    assert "a step calls none of its networks" in capsys.readouterr().err


class Desk:
    """An engine that serves a model in the mode chosen for it."""

    def __init__(
        self,
        model: Model,
        folder: Path,
        modes: Sequence[str] = (),
        precision: Precision = "float32",
        favour: Favour = "both",
        max_rows: int = 8,
    ) -> None:
        self.told: dict[str, list[Message]] = {}
        self.engine = Engine(
            lambda job, message, final: self.told.setdefault(job, []).append(message), max_rows=max_rows
        )
        self.renewed: list[Renewed] = []
        self.modes = Modes(self.engine.warm, folder, modes, {"m": precision}, max_rows, self.renewed.append, favour)
        self.warm = self.modes.warm("m", model)
        self.engine.take_in("m", "1", self.warm)

    def draw(self, job: str = "a") -> tuple[np.ndarray, Completed]:
        self.engine.submit(job, "m", Generate(3, seed=1, steps=6))
        while self.engine.step():
            pass
        last = self.told[job][-1]
        assert isinstance(last, Completed)
        return np.stack([m.pixels for m in self.told[job] if isinstance(m, ImageDone)]), last


def test_eager_float32_unless_something_else_is_asked_for(model: Model, tmp_path: Path) -> None:
    desk = Desk(model, tmp_path)
    found = desk.warm.execution
    assert (found.mode, found.precision, found.determinism, found.not_chosen) == ("eager", "float32", "exact", {})
    assert found.seconds_per_step.keys() == {"1", "8"}
    assert all(seconds > 0 for seconds in found.seconds_per_step.values())
    assert desk.draw()[1].precision == "float32"


def test_a_mode_that_changes_one_pixel_is_not_chosen_however_fast(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_modes, "ChannelsLast", halved)
    monkeypatch.setattr(modes, "_ratio", lambda *_: 0.01)
    desk = Desk(model, tmp_path, ["channels-last"])
    assert desk.warm.execution.mode == "eager"
    assert "of 512 pixels" in desk.warm.execution.not_chosen["channels-last"]


def test_a_mode_that_raises_or_has_nothing_to_run_leaves_the_model_in_service(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(network: nn.Module) -> Callable[..., Any]:
        raise RuntimeError("no such order\nand more")

    monkeypatch.setattr(_modes, "ChannelsLast", broken)
    _checkpoint.save(tmp_path / "m", model, family_of("ddpm").Config(**TINY["ddpm"][0]), {"metrics": {}})
    desk = Desk(model, tmp_path, ["channels-last", "onnx", "cuda-graphs"])
    told = desk.warm.execution.not_chosen
    assert told["channels-last"] == "RuntimeError: no such order"
    assert "python -m training export" in told["onnx"]
    assert "CUDA" in told["cuda-graphs"] or torch.cuda.is_available()
    assert len(desk.draw()[0]) == 3
    alone = untrained("gaussian").eval().requires_grad_(False)
    found = Desk(alone, tmp_path, ["channels-last"], "bfloat16").warm.execution
    assert found.precision == "float32"
    assert set(found.not_chosen) == {"channels-last", "bfloat16"}


def refusing(refuses: Callable[..., bool]) -> Callable[[nn.Module], Callable[..., Any]]:
    """A mode that raises where it is called so."""

    def made(network: nn.Module) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if refuses(*args):
                raise RuntimeError("not so")
            return network(*args)

        return call

    return made


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_mode_that_cannot_draw_without_a_condition_is_not_chosen(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    """Examples have a label: of those without, a network sees labels of -1 alone."""
    monkeypatch.setattr(_modes, "ChannelsLast", refusing(lambda x, t, labels: bool((labels < 0).all())))
    monkeypatch.setattr(modes, "_ratio", lambda *_: 0.5)
    desk = Desk(model, tmp_path, ["channels-last"], precision)
    assert desk.warm.execution.mode == "eager"
    assert desk.warm.execution.precision == precision
    assert desk.warm.execution.not_chosen["channels-last"] == "RuntimeError: not so"
    assert len(desk.draw()[0]) == 3


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_mode_that_fails_when_the_model_is_tried_in_large_batches_is_given_up(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    monkeypatch.setattr(_modes, "ChannelsLast", refusing(lambda x, t, labels: len(x) > 40))
    monkeypatch.setattr(modes, "_ratio", lambda *_: 0.5)
    desk = Desk(model, tmp_path, ["channels-last"], precision, max_rows=64)
    found = desk.warm.execution
    assert (found.mode, found.precision) == ("eager", "float32")
    expected = {"channels-last"} | {precision} - {"float32"}
    assert found.not_chosen == dict.fromkeys(expected, "RuntimeError: not so")
    np.testing.assert_array_equal(desk.draw()[0], Desk(model, tmp_path).draw()[0])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_mode_that_fails_later_is_given_up_where_images_stay_the_same(
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    precision: Precision,
) -> None:
    broken, calls = [False], [0]

    def refuses(*args: Any) -> bool:
        calls[0] += 1
        return broken[0]

    monkeypatch.setattr(_modes, "ChannelsLast", refusing(refuses))
    monkeypatch.setattr(modes, "_ratio", lambda *_: 0.5)
    desk = Desk(model, tmp_path, ["channels-last"], precision)
    assert desk.warm.execution.mode == "channels-last"
    before = desk.draw()[0]
    broken[0], calls[0] = True, 0
    desk.engine.submit("later", "m", Generate(3, seed=1, steps=6))
    while desk.engine.step():
        pass
    if precision == "bfloat16":
        assert desk.told["later"][-1] == Failed("row", "RuntimeError: not so")
        return
    np.testing.assert_array_equal(np.stack([m.pixels for m in desk.told["later"] if isinstance(m, ImageDone)]), before)
    assert calls == [1], "it is not asked again"
    assert "m: channels-last is given up for eager" in caplog.text
    (renewed,) = desk.renewed
    found = renewed.execution
    assert (renewed.warm, found.mode, found.not_chosen) == (None, "eager", {"channels-last": "RuntimeError: not so"})
    assert found.seconds_per_step == desk.warm.execution.seconds_per_step


def test_what_shall_be_fast_decides_between_modes(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of what is compiled for sixteen rows: faster where there are as many, slower where there is one."""
    monkeypatch.setattr(modes, "_same_levels", lambda *_: None)
    seconds = {("original", 1): 1.0, ("other", 1): 3.0, ("original", 16): 8.0, ("other", 16): 4.0}
    monkeypatch.setattr(modes, "_seconds", lambda m, rows: seconds["original" if m is model else "other", rows])
    for favour, mode in (("lone", "eager"), ("full", "channels-last"), ("both", "eager")):
        found = Desk(model, tmp_path, ["channels-last"], favour=favour, max_rows=16).warm.execution
        assert found.mode == mode
    assert found.not_chosen["channels-last"].startswith("1.22 times")  # √(3 · ½)


def test_the_faster_of_equal_modes_is_chosen_and_draws_the_same(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modes, "_same_levels", lambda *_: None)
    eager = Desk(model, tmp_path)
    for ratio, mode in ((0.5, "channels-last"), (0.99, "eager"), (1.5, "eager")):
        monkeypatch.setattr(modes, "_ratio", lambda *_, ratio=ratio: ratio)
        desk = Desk(model, tmp_path, ["eager", "channels-last"])
        assert desk.warm.execution.mode == mode
        (loser,) = desk.warm.execution.not_chosen
        assert loser != mode
        difference = np.abs(desk.draw()[0].astype(int) - eager.draw(f"{ratio}")[0])
        assert difference.max() <= 1, "a rounding tie may fall the other way"


def test_copies_of_weights_count_as_memory(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "_same_levels", lambda *_: None)
    monkeypatch.setattr(modes, "_ratio", lambda *_: 0.5)
    plain, fast, low = (
        weigh(desk.warm)
        for desk in (
            Desk(model, tmp_path),
            Desk(model, tmp_path, ["channels-last"]),
            Desk(model, tmp_path, precision="bfloat16"),
        )
    )
    copied = sum(p.nbytes for p in model.networks()["network"].parameters())
    assert plain == low == weigh(model)
    assert fast - plain == pytest.approx(copied, rel=0.1)


def test_bfloat16_is_told_and_leaves_scores_alone(model: Model, tmp_path: Path) -> None:
    plain, low = Desk(model, tmp_path), Desk(model, tmp_path, precision="bfloat16")
    assert low.warm.execution.precision == "bfloat16"
    assert not np.array_equal(low.draw()[0], plain.draw()[0])
    assert low.draw("again")[1].precision == "bfloat16"
    x = (pictures(3, model.spec.image) * 255).round().to(torch.uint8).numpy()
    for desk in (plain, low):
        desk.engine.submit("s", "m", ScoreImages(x, (-1,) * 3))
        while desk.engine.step():
            pass
    scores, same = ([m for m in desk.told["s"] if isinstance(m, Scored)] for desk in (plain, low))
    assert len(scores) == 3
    for a, b in zip(scores, same, strict=True):
        assert dataclasses.replace(a, features={}) == dataclasses.replace(b, features={})
        assert a.features.keys() == b.features.keys()
        assert all(np.array_equal(a.features[name], b.features[name]) for name in a.features)
    assert plain.told["s"][-1].precision == low.told["s"][-1].precision == "float32"  # type: ignore[union-attr]


def test_bfloat16_images_are_the_same_alone_and_in_a_crowd(model: Model, tmp_path: Path) -> None:
    desk = Desk(model, tmp_path, precision="bfloat16")
    alone = desk.draw()[0]
    for k in range(7):
        desk.engine.submit(f"other{k}", "m", Generate(1 + k % 3, seed=k, steps=3 + k))
        desk.engine.step()
    np.testing.assert_array_equal(desk.draw("crowded")[0], alone)


def test_what_was_made_later_takes_the_jobs_that_come_from_then_on(model: Model, tmp_path: Path) -> None:
    desk = Desk(model, tmp_path)
    desk.engine.submit("before", "m", Generate(2, seed=3, steps=6))
    desk.engine.step()
    runs: list[int] = []
    network = model.networks()["network"]
    made = twin(model, {"network": lambda *args: (runs.append(len(args[0])), network(*args))[1]})
    desk.engine.renew("m", desk.engine.warm("m", model, made, Execution("compile")))
    runs.clear()
    for _ in range(5):
        desk.engine.step()
    assert isinstance(desk.told["before"][-1], Completed)
    assert not runs, "a job that had begun ends as it began"
    assert desk.engine.versions() == {"m@1": False}
    before = desk.draw()[0]
    assert runs
    np.testing.assert_array_equal(before, Desk(model, tmp_path).draw()[0])
    assert not desk.engine.serves("m", untrained("ddpm"))
    assert desk.engine.serves("m", model)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore")  # the compiler's words to itself
def test_a_network_is_compiled_in_the_background_and_kept_for_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    monkeypatch.setattr(modes, "_ratio", lambda *_: 0.5)
    monkeypatch.setattr(modes, "_same_levels", lambda *_: None)
    gan = untrained("gan").eval().requires_grad_(False)
    desk = Desk(gan, tmp_path, ["compile"])
    assert desk.warm.execution.mode == "eager"
    eager = desk.draw()[0]
    for thread in threading.enumerate():
        if thread.name == "compile m":
            thread.join()
    (renewed,) = desk.renewed
    assert renewed.warm is not None, renewed.execution
    assert renewed.execution == renewed.warm.execution
    assert renewed.execution.mode == "compile"
    desk.engine.renew("m", renewed.warm)
    assert np.abs(desk.draw("later")[0].astype(int) - eager).max() <= 1
    assert any((tmp_path / "kept").rglob("*.so")), "a restart finds it"


def test_what_cannot_be_compiled_is_told_and_served_as_it_is(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(network: nn.Module, sizes: Sequence[int]) -> Callable[..., Any]:
        raise RuntimeError("backend='x' raised:\nOSError: kept/a.so: file too short\n\nand more")

    monkeypatch.setattr(_modes, "compiled", broken)
    desk = Desk(model, tmp_path, ["compile"])
    for thread in threading.enumerate():
        if thread.name == "compile m":
            thread.join()
    (renewed,) = desk.renewed
    assert renewed.warm is None
    assert renewed.execution.not_chosen == {
        "compile": "RuntimeError: backend='x' raised: OSError: kept/a.so: file too short"
    }
    assert renewed.execution.seconds_per_step == desk.warm.execution.seconds_per_step
    assert len(desk.draw()[0]) == 3


def test_compiling_begins_when_the_model_has_been_tried(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would disturb the clock; and one thread after the other writes down what was chosen."""
    warm, compiling = Engine.warm, []

    def watched(*args: Any) -> Any:
        compiling.append([thread.name for thread in threading.enumerate() if thread.name.startswith("compile")])
        return warm(*args)

    began, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(Engine, "warm", watched)
    monkeypatch.setattr(_modes, "compiled", lambda *_: (began.set(), go_on.wait(60)))
    Desk(model, tmp_path, ["compile", "channels-last"])
    assert began.wait(60)
    go_on.set()
    assert compiling == [[]]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_compiled_sooner_than_the_model_is_taken_in_is_not_lost(
    model: Model, tmp_path: Path, precision: Precision
) -> None:
    engine = Engine(lambda *_: None, max_rows=4)
    asked: list[str] = []
    residency = Residency(engine, asked.append)
    residency.hear(Found("m", "1", 1))
    residency.pump()
    assert asked == ["m"]
    first = engine.warm("m", model)
    network = model.networks()["network"]
    second = engine.warm("m", model, twin(model, {"network": network}), Execution("compile", precision))
    assert not residency.renew("m", model, second, second.execution)
    residency.hear(Loaded("m", "1", first, 1, 0.1))
    assert residency.states["m"].execution == second.execution
    assert engine._lanes[engine._models["m"].lanes["draw"]] is second.lanes[0]


def test_a_user_without_a_home_is_no_reason_not_to_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(os, "environ", {})
    modes.use_cache(None)
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    modes.use_cache(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)


# ------------------------------------------------------------------------------------------------------------- settings


def test_modes_and_precisions_are_read_or_refused() -> None:
    assert modes_in("eager, compile,eager") == ("eager", "compile")
    with pytest.raises(ValueError, match="'fast'; there are eager, channels-last"):
        modes_in("fast")
    assert precisions_in("a=bfloat16, b = float32") == {"a": "bfloat16", "b": "float32"}
    assert precisions_in("") == {}
    for wrong in ("a", "=bfloat16", "a=half"):
        with pytest.raises(ValueError, match="precision: "):
            precisions_in(wrong)


def test_an_execution_survives_its_way() -> None:
    sent = Execution("compile", "bfloat16", "pixels", 4, {"1": 0.1}, {"onnx": "slow"})
    assert execution_in(dataclasses.asdict(sent)) == sent
    assert execution_in(None) is None
