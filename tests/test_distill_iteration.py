"""One iteration of a distillation against numbers worked out by hand: loss, gradient, clipping, rates and the average.

The network is the tiny FLUX checkpoint; where a number must be known, the walk through a segment is replaced by a
function whose gradient is.
"""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from arcflow_distill.errors import DistillError
from arcflow_distill.train import trainer
from arcflow_distill.train.checkpoint import load_state, save_state
from arcflow_distill.train.config import Config
from arcflow_distill.train.ema import Ema
from arcflow_distill.train.prompts import EncodedPrompt, Encoder, TextSource, collate
from arcflow_distill.train.trainer import Distillation, distill
from tests.conftest import GOLDEN

FLUX = GOLDEN / "flux-tiny" / "base"
PROMPTS = ("a cat", "a large red dog", "two birds", "an old sailor")
#: Sigma where the two steps of the released schedule begin: 3.2 t / (1 + 2.2 t) at t = 1 and 1/2.
SIGMAS = (1.0, 1.6 / 2.1)


def config(root, **settings) -> Config:
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    small = {
        "prompts": str(root / "prompts.txt"),
        "max_sequence_length": 8,
        "resolutions": [(32, 48), (64, 32), (32, 32)],
        "modes": 3,
        "rank": 2,
        "lora_dropout": 0.0,
        "dtype": "float32",
        "adapter_dtype": "float32",
        "gradient_checkpointing": False,
        "iterations": 4,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "warmup": 2,
        "decay_iterations": 4,
        "ema_start": 0,
        "loss_scale": 7.0,
        "grad_clip": 0.5,
        "gamma_rate": 0.25,
    }
    return Config(**small | settings)


def started(root, **settings) -> Distillation:
    return Distillation(config(root, **settings), FLUX, Accelerator(mixed_precision="no"))


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> tuple[Distillation, dict[str, torch.Tensor]]:
    """A run and the weights that it begins with."""
    run = started(tmp_path_factory.mktemp("run"))
    return run, {name: p.detach().clone() for name, p in run.trained.items()}


@pytest.fixture
def run(opened) -> Distillation:
    """A run that has not begun."""
    run, weights = opened
    for name, p in run.trained.items():
        p.data.copy_(weights[name])
        p.grad = None
    run.optimizer = trainer._optimizer(run.trained, run.config)
    run.ema = Ema(run.trained, run.config.ema_gamma, run.config.ema_start)
    run._skipped = 0
    return run


@dataclasses.dataclass
class Segment:
    """What one step gave to the walk: latents, times, the student's prediction and how it was told to walk."""

    x: torch.Tensor
    time: float
    length: float
    ratio: float
    policy: object
    mixing: object
    error: float


@pytest.fixture
def segments(monkeypatch) -> list[Segment]:
    """The steps of iterations to come; the error of step i is (i + 1) sum(means), and its latents are all i + 1."""
    seen: list[Segment] = []

    def walk(policy, x, time, length, ratio, teacher, mixing, generator):
        step = sum(s.time > time for s in seen[-1:])
        error = (step + 1) * policy.means.sum()
        seen.append(Segment(x, time, length, ratio, policy, mixing, float(error.detach())))
        return error, torch.full_like(x, step + 1.0)

    monkeypatch.setattr(trainer, "walk_segment", walk)
    return seen


def test_the_loss_is_half_the_error_times_scale_and_length(run, segments):
    """Of both steps: 0.5 x 7 x (1/2) x error each, added up; the second step begins where the first one ended."""
    figures = run.iterate(1)
    first, second = segments
    assert figures.loss == pytest.approx(0.5 * 7.0 * 0.5 * (first.error + second.error))
    assert [(s.time, s.length) for s in segments] == [(1.0, 0.5), (0.5, 0.5)]
    assert [s.policy.sigma for s in segments] == pytest.approx(SIGMAS)
    assert (second.x == 1).all() and not (first.x == 1).any()
    assert first.ratio == second.ratio == figures.ratio == 0.75
    assert figures.learning_rate == pytest.approx(1e-2 * (1e-3 + 0.999 / 2))


def test_a_step_has_the_length_of_its_share_of_the_time(tmp_path, segments):
    run = started(tmp_path, steps=4)
    loss = run.iterate(0).loss
    assert [(s.time, s.length) for s in segments] == [(t, 0.25) for t in (1.0, 0.75, 0.5, 0.25)]
    assert loss == pytest.approx(0.5 * 7.0 * 0.25 * sum(s.error for s in segments))


def test_the_gradient_is_that_of_the_loss_of_all_steps(run, segments):
    """Means are linear in their head's bias: every token and image adds 1, so the gradient of each of its entries is
    B N (1 + 2), times 0.5 x 7 x 1/2.
    """
    weights = {name: p.detach().clone() for name, p in run.trained.items()}
    moments: dict[str, torch.Tensor] = {}

    def keep(*_):
        moments.update({name: p.grad.clone() for name, p in run.trained.items() if p.grad is not None})

    run.optimizer.register_step_pre_hook(keep)
    figures = run.iterate(0)  # in the warm-up nothing is clipped
    tokens = segments[0].x.shape[1]
    expected = 0.5 * 7.0 * 0.5 * 2 * tokens * 3
    assert torch.allclose(moments["proj_out_means.bias"], torch.tensor(expected))
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in moments.values()))
    assert figures.gradient_norm == pytest.approx(norm, rel=1e-5)
    assert not torch.equal(run.trained["proj_out_means.bias"], weights["proj_out_means.bias"])
    assert all(p.grad is None for p in run.trained.values()), "the next iteration begins with no gradient"


def give_gradients(run: Distillation) -> float:
    """Every trained parameter's gradient is 1; returns their norm."""
    for p in run.trained.values():
        p.grad = torch.ones_like(p)
    return math.sqrt(sum(p.numel() for p in run.trained.values()))


@pytest.mark.parametrize(("iteration", "clipped"), [(0, False), (1, False), (2, True), (3, True)])
def test_gradients_are_clipped_after_the_warm_up_only(run, iteration, clipped):
    """Adam's first moment is (1 - beta1) times the gradient that it was given."""
    norm = give_gradients(run)
    assert run._update(iteration, 1e-2) == pytest.approx(norm, rel=1e-5), "the norm before clipping"
    seen = run.optimizer.state[run.trained["norm_out.linear.bias"]]["exp_avg"] / (1 - run.config.betas[0])
    # torch divides by the norm plus 1e-6.
    assert torch.allclose(seen, torch.tensor(0.5 / norm if clipped else 1.0), rtol=1e-5)


def test_small_gradients_are_not_clipped(run):
    for p in run.trained.values():
        p.grad = torch.full_like(p, 1e-6)
    run._update(3, 1e-2)
    seen = run.optimizer.state[run.trained["norm_out.linear.bias"]]["exp_avg"] / (1 - run.config.betas[0])
    assert torch.allclose(seen, torch.tensor(1e-6), rtol=1e-5)


def test_every_parameter_moves_by_its_rate(run):
    """Adam's first step is the rate, whatever the gradient's size; no weight decays, and gammas move a quarter."""
    before = {name: p.detach().clone() for name, p in run.trained.items()}
    give_gradients(run)
    run._update(0, 3e-3)
    for name, p in run.trained.items():
        moved = 3e-3 * (0.25 if name.startswith("proj_out_loggamma") else 1)
        # Weights of about 1 are stored to 2^-24 of their size.
        assert torch.allclose(
            before[name] - p, torch.tensor(moved), rtol=1e-3, atol=2**-23 * float(p.detach().abs().max())
        )
    assert run.optimizer.param_groups[0]["betas"] == (0.9, 0.95)


def test_an_update_that_is_left_out_is_forgotten_after_a_good_one(run):
    """The count is of updates in a row: 19 bad ones, a good one and 19 more raise nothing."""
    for i in range(39):
        give_gradients(run)
        if i != 19:
            run.trained["norm_out.linear.bias"].grad.fill_(math.inf)
        assert math.isfinite(run._update(i, 1e-2)) == (i == 19)


# Random numbers.


class Told(Exception):
    """The first network call's arguments, after which nothing need be computed."""


def first_call(run: Distillation, iteration: int, process: int = 0):
    """Noise, text and canvas of an iteration's first call on one process."""

    def tell(_, arguments):
        raise Told(*arguments)

    run.accelerator = SimpleNamespace(process_index=process, no_sync=run.accelerator.no_sync)
    hook = run.student.register_forward_pre_hook(tell)
    try:
        run.iterate(iteration)
    except Told as e:
        x, sigma, text, canvas = e.args
        assert (sigma == 1).all() and len(sigma) == len(x)
        return x, text, canvas
    finally:
        hook.remove()
    raise AssertionError("the student was not called")


def test_processes_draw_other_noise_and_prompts_and_the_same_size(tmp_path):
    run, sizes = started(tmp_path, batch_size=3), set()
    for iteration in range(8):
        (x, text, canvas), (other, other_text, other_canvas) = (first_call(run, iteration, p) for p in (0, 1))
        assert canvas == other_canvas and not torch.equal(x, other)
        sizes.add((canvas.height, canvas.width))
        assert canvas.guidance_scale == 3.5 and x.shape == (3, canvas.tokens, 64)
        assert not torch.equal(text.states, other_text.states), "three of four prompts, drawn twice"
        again, *_ = first_call(run, iteration)
        assert torch.equal(x, again)
    assert sizes == {(2, 3), (4, 2), (2, 2)}


def test_noise_is_standard_normal_and_another_in_every_iteration(tmp_path):
    run = started(tmp_path, batch_size=8)
    noise = [first_call(run, i)[0].flatten() for i in range(6)]
    values = torch.cat(noise)
    # The mean of n numbers is off by 1 / sqrt(n), their variance by sqrt(2 / n): four times that is 1 in 16,000.
    room = 4 / math.sqrt(len(values))
    assert abs(float(values.mean())) < room and abs(float(values.var()) - 1) < math.sqrt(2) * room
    assert not any(torch.equal(a[:64], b[:64]) for i, a in enumerate(noise) for b in noise[:i])
    assert not torch.equal(noise[0][:64], noise[0][64:128])


def test_the_teacher_with_guidance_gets_the_empty_prompt_first(tmp_path, monkeypatch):
    run = started(tmp_path, true_cfg_scale=2.0)
    asked = []
    run.teacher = lambda x, sigma, text, canvas: asked.append((sigma, text, canvas))

    def walk(policy, x, time, length, ratio, teacher, mixing, generator):
        teacher(x, time)
        return policy.means.sum(), x

    monkeypatch.setattr(trainer, "walk_segment", walk)
    run.iterate(0)
    assert [time for time, _, _ in asked] == [1.0, 0.5]
    _, text, canvas = asked[1]
    assert len(text.states) == 4 and canvas.tokens in (6, 8, 4)
    empty = run.text.negative
    assert all(torch.equal(row, empty.states) for row in text.states[:2])
    assert all(torch.equal(row, empty.pooled) for row in text.pooled[:2])
    assert not any(torch.equal(row, empty.states) for row in text.states[2:])


def test_settings_of_the_walk_are_the_configurations(tmp_path, segments):
    """One field at a time is another; the defaults are the released students'."""
    names = {
        "intermediate_states": ("states", 3),
        "substeps": ("substeps", 64),
        "window_substeps": ("window_substeps", 2),
        "mode_dropout": ("mode_dropout", 0.25),
        "center_window": ("center_window", True),
    }
    assert {f.name for f in dataclasses.fields(trainer.Mixing)} == {field for field, _ in names.values()}
    run = started(tmp_path, **{name: value for name, (_, value) in names.items()})
    assert dataclasses.asdict(run.mixing) == dict(names.values())


# Prompts.


class Words:
    """Encodes a prompt as its length, and keeps what it was asked."""

    def __init__(self):
        self.asked: list[list[str]] = []

    def encode(self, prompts):
        self.asked.append(list(prompts))
        return [
            EncodedPrompt(torch.full((len(p) or 1, 2), float(len(p))), torch.tensor([float(len(p))])) for p in prompts
        ]


@pytest.mark.parametrize(("cached", "whole"), [(3, True), (2, False)])
def test_prompts_are_encoded_once_where_they_are_few_enough(cached, whole):
    words = Words()
    source = TextSource(["a", "bb", "a", "ccc"], words, cached, torch.device("cpu"))
    assert source.cached == whole and source.count == 4
    assert words.asked == [["a", "bb", "ccc"], [""]] if whole else [[""]]
    assert source.negative.states.tolist() == [[0.0, 0.0]]
    drawn = source.draw(400, torch.Generator().manual_seed(0))
    lengths = torch.tensor([float(p.pooled) for p in drawn])
    # "a" is in the list twice: half of the draws; four standard deviations of a share of a half.
    assert abs(float((lengths == 1).float().mean()) - 0.5) < 4 * 0.5 / 20
    assert set(lengths.tolist()) == {1.0, 2.0, 3.0}


def test_prompts_are_encoded_in_small_batches_and_none_is_left_out():
    encoder, seen = Encoder.__new__(Encoder), []
    encoder._encode = lambda prompts: seen.append(len(prompts)) or prompts
    assert encoder.encode([str(i) for i in range(70)]) == [str(i) for i in range(70)]
    assert seen == [32, 32, 6]


def test_a_batch_is_padded_and_masked_where_lengths_differ():
    rows = Words().encode(["bb", "a", "ccc"])
    text = collate(rows)
    assert text.states.shape == (3, 3, 2) and text.pooled.tolist() == [[2.0], [1.0], [3.0]]
    assert text.mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert text.states[..., 0].tolist() == [[2, 2, 0], [1, 0, 0], [3, 3, 3]]
    equal = collate(rows[:1] * 2)
    assert equal.mask is None and equal.states.shape == (2, 2, 2)
    assert collate([EncodedPrompt(torch.ones(1, 2), None)]).pooled is None


# The average.


def test_the_average_begins_where_it_is_told():
    """gamma 1: from `start` on (1 - 1/t)^2 is kept. Values 1, 2, 3, 4, 5 from iteration 0, start 2, by hand:
    up to iteration 2 the last value, then 1/4 of 3 and 3/4 of 4, then 4/9 of that and 5/9 of 5.
    """
    ema = Ema({"w": torch.zeros(1)}, 1.0, 2)
    seen = []
    for i in range(5):
        ema.update({"w": torch.tensor([i + 1.0])}, i)
        seen.append(float(ema.tensors["w"]))
    assert seen == pytest.approx([1, 2, 3, 15 / 4, 4 / 9 * 15 / 4 + 25 / 9])


def test_the_written_adapter_is_the_average_of_the_weights(tmp_path, monkeypatch):
    """Replayed in float64 with ema_gamma 1 and ema_start 1; neither the last weights nor those of the start."""
    history: list[dict[str, torch.Tensor]] = []

    def iterate(self, iteration):
        for i, p in enumerate(self.trained.values()):
            p.grad = torch.full_like(p, math.cos(iteration + i))
        norm = self._update(iteration, 1e-2)
        history.append({name: p.detach().double().clone() for name, p in self.trained.items()})
        return trainer.Figures(0.0, 0.0, 1e-2, norm)

    monkeypatch.setattr(Distillation, "iterate", iterate)
    out = distill(config(tmp_path, ema_gamma=1.0, ema_start=1), FLUX, tmp_path / "out", progress=False)
    written = load_file(out / "diffusion_pytorch_model.safetensors")
    assert len(history) == 4 and written.keys() == history[0].keys()
    for name, tensor in written.items():
        average = history[1][name]
        for t, weights in ((2, history[2][name]), (3, history[3][name])):
            average = average * (1 - 1 / t) ** 2 + weights * (1 - (1 - 1 / t) ** 2)
        # Each update in float32 rounds a few times to 2^-24.
        torch.testing.assert_close(tensor.double(), average, rtol=2e-6, atol=2e-7)
    name = "proj_out_means.bias"
    for other in history:
        assert (written[name] - other[name]).abs().max() > 1e-4


def test_a_checkpoint_holds_weights_average_and_moments_apart(run, tmp_path):
    """Three kinds of numbers that differ, written and read into another run."""
    for i, p in enumerate(run.trained.values()):
        p.data.fill_(1.0 + i)
    for i, t in enumerate(run.ema.tensors.values()):
        t.fill_(1000.0 + i)
    give_gradients(run)
    run.optimizer.step()
    weights = {name: p.detach().clone() for name, p in run.trained.items()}
    save_state(tmp_path / "s", run.trained, run.ema, run.optimizer, {})
    other = started(tmp_path)
    load_state(tmp_path / "s", other.trained, other.ema, other.optimizer)
    for i, (name, p) in enumerate(other.trained.items()):
        assert torch.equal(p, weights[name])
        assert (other.ema.tensors[name] == 1000 + i).all()
        ours, theirs = (r.optimizer.state[r.trained[name]] for r in (other, run))
        assert ours.keys() == theirs.keys() == {"exp_avg", "exp_avg_sq", "step"}
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    moments = other.optimizer.state[other.trained["norm_out.linear.bias"]]
    assert float(moments["step"]) == 1
    assert torch.allclose(moments["exp_avg"], torch.tensor(0.1))
    assert torch.allclose(moments["exp_avg_sq"], torch.tensor(0.05))


# What a resumed run may change.

#: Another valid value of every setting; `prompts` and the like too, since the numbers depend on them.
OTHER = {
    "prompts": "other.txt",
    "prompt_count": 5,
    "cached_prompts": 5,
    "max_sequence_length": 16,
    "resolutions": ((16, 16),),
    "guidance_scale": 1.0,
    "true_cfg_scale": 2.0,
    "modes": 2,
    "rank": 3,
    "lora_dropout": 0.5,
    "dtype": "bfloat16",
    "adapter_dtype": "bfloat16",
    "gradient_checkpointing": True,
    "steps": 3,
    "intermediate_states": 3,
    "substeps": 64,
    "window_substeps": 2,
    "center_window": True,
    "mode_dropout": 0.2,
    "decay_iterations": 5,
    "loss_scale": 1.0,
    "iterations": 5,
    "batch_size": 3,
    "learning_rate": 0.5,
    "gamma_rate": 0.5,
    "betas": (0.8, 0.9),
    "warmup": 1,
    "schedule": "cosine",
    "grad_clip": 1.0,
    "ema_gamma": 1.0,
    "ema_start": 1,
    "seed": 1,
    "save_every": 7,
}
FREE = {"iterations", "save_every", "cached_prompts", "gradient_checkpointing", "adapter_dtype"}


def test_every_setting_of_a_run_is_tried():
    assert OTHER.keys() == Config.model_fields.keys()


@pytest.mark.parametrize("name", OTHER)
def test_a_resumed_run_has_the_settings_that_its_weights_depend_on(name, tmp_path, monkeypatch):
    before = config(tmp_path)
    after = Config(**before.model_dump() | {name: OTHER[name]})
    assert getattr(after, name) != getattr(before, name)
    stored = {"config": before.model_dump(mode="json"), "base_digest": "b", "iteration": 4}
    monkeypatch.setattr(trainer, "read_facts", lambda _: stored)
    facts = {"config": after.model_dump(mode="json"), "base_digest": "b"}
    if name in FREE:
        assert trainer._resumable(tmp_path / "s", facts) is stored
    else:
        with pytest.raises(DistillError, match=f"--resume: {name} was .* when the run began"):
            trainer._resumable(tmp_path / "s", facts)


def test_a_run_of_another_base_or_with_fewer_iterations_is_not_resumed(tmp_path, monkeypatch):
    settings = config(tmp_path).model_dump(mode="json")
    monkeypatch.setattr(
        trainer, "read_facts", lambda _: {"config": settings, "base_digest": "b", "iteration": settings["iterations"]}
    )
    assert trainer._resumable(tmp_path / "s", {"config": settings, "base_digest": "b"})["iteration"] == 4
    with pytest.raises(DistillError, match="another base checkpoint"):
        trainer._resumable(tmp_path / "s", {"config": settings, "base_digest": "c"})
    with pytest.raises(DistillError, match="4 iterations are done already"):
        trainer._resumable(tmp_path / "s", {"config": settings | {"iterations": 3}, "base_digest": "b"})
