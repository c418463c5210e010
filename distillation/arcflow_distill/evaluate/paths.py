"""Draw the figure that shows the method: paths of latents from noise to image, one panel per prompt.

Each panel projects a prompt's paths onto the plane of the first two principal directions of the teacher's path. It
shows the teacher's path in many steps, the student's arcs between its two network calls, and two straight Euler steps.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from arcflow_distill.evaluate.samplers import Generated, TeacherPipeline
from arcflow_distill.evaluate.students import Call, StudentSampler
from arcflow_export.images.cases import GROUPS, Cases
from arcflow_runtime.maths.update import update

#: Number of panels, and of points of each of the student's arcs.
PANELS, ARC_POINTS = 4, 33
_COLORS = {"teacher": "#9aa0a6", "student": "#d7263d", "chord": "#1b6ca8"}


@dataclass(frozen=True)
class Walks:
    """One prompt's paths in latent space: points [S, D] float32 of each path, and the images [64, 64, 3] at their ends.

    The student's path is a tuple of arcs [ARC_POINTS, D], one per network call, each starting where the network was
    called. `chord` is the teacher's path with as many Euler steps as the student has calls.
    """

    caption: str
    teacher: np.ndarray
    student: tuple[np.ndarray, ...]
    chord: np.ndarray
    images: dict[str, np.ndarray]


def walk(
    cases: Cases, teacher: TeacherPipeline, student: StudentSampler, generated: Generated, steps: int
) -> list[Walks]:
    """Compute the paths of the prompts of the seen group that name the fewest attributes.

    Args:
        cases: the prompts; those with equally many attributes are taken in order.
        teacher: runs `steps` Euler steps, and as many steps as the student has calls.
        student: gives its network calls.
        generated: the student's images of all cases.
        steps: number of steps of the teacher's path.
    """
    rows = sorted(cases.rows(GROUPS[0]), key=lambda i: len(cases.words[i]))[:PANELS]
    captions, seeds = [cases.captions[i] for i in rows], [cases.seeds[i] for i in rows]
    calls = student.calls(captions, seeds)
    long, long_images = teacher.walk(captions, seeds, steps)
    short, short_images = teacher.walk(captions, seeds, student.network_calls)
    arcs = [arc(call) for call in calls]
    return [
        Walks(
            caption,
            long[:, i].reshape(len(long), -1),
            tuple(a[:, i].reshape(len(a), -1) for a in arcs),
            short[:, i].reshape(len(short), -1),
            {"teacher": long_images[i], "student": generated.images[row], "chord": short_images[i]},
        )
        for i, (row, caption) in enumerate(zip(rows, captions, strict=True))
    ]


def arc(call: Call, points: int = ARC_POINTS) -> np.ndarray:
    """The student's path within one step, integrated in closed form from point to point: [points, B, N, C]."""
    grid = np.linspace(call.sigma, call.sigma_next, points)
    path = [call.latents]
    for start, end in pairwise(grid):
        path.append(update(path[-1], call.means, call.logweights, call.loggammas, call.sigma, start, end))
    return np.stack(path)


def principal_plane(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean [D] of points [S, D], and their first two principal directions [2, D] of unit length."""
    center = points.mean(0)
    return center, np.linalg.svd(points - center, full_matrices=False)[2][:2]


def figure(walks: Sequence[Walks], student_label: str, steps: int) -> Figure:
    """Draw one panel per prompt, with the images at the ends of its three paths below it."""
    result = Figure(figsize=(3.6 * len(walks), 5.5), dpi=150, facecolor="white")
    FigureCanvasAgg(result)
    grid = result.add_gridspec(
        2, len(walks), height_ratios=(2.5, 1), left=0.04, right=0.985, top=0.84, bottom=0.06, wspace=0.14, hspace=0.14
    )
    calls = len(walks[0].student)
    labels = {
        "teacher": f"teacher, {steps} Euler steps",
        "student": f"{student_label}, {calls} network calls",
        "chord": f"teacher, {calls} Euler steps",
    }
    for column, walked in enumerate(walks):
        axes = result.add_subplot(grid[0, column])
        _panel(axes, walked, labels)
        if column == 0:
            handles, names = axes.get_legend_handles_labels()
            result.legend(handles, names, loc="upper center", ncols=len(names), frameon=False, fontsize=11)
        thumbnails = grid[1, column].subgridspec(1, 3, wspace=0.12)
        below = {"teacher": f"{steps} steps", "student": f"{student_label}, {calls}", "chord": f"{calls} steps"}
        for place, (name, color) in enumerate(_COLORS.items()):
            _thumbnail(result.add_subplot(thumbnails[0, place]), walked.images[name], color, below[name])
    return result


def _panel(axes: Axes, walked: Walks, labels: dict[str, str]) -> None:
    center, plane = principal_plane(walked.teacher)

    def project(points: np.ndarray) -> np.ndarray:
        return (points - center) @ plane.T

    teacher, chord, arcs = project(walked.teacher), project(walked.chord), [project(a) for a in walked.student]
    smooth = np.concatenate(arcs)
    calls = np.stack([a[0] for a in arcs])
    axes.plot(*teacher.T, color=_COLORS["teacher"], lw=5, alpha=0.55, solid_capstyle="round", label=labels["teacher"])
    axes.plot(*chord.T, color=_COLORS["chord"], lw=1.5, ls=(0, (4, 2)), label=labels["chord"])
    axes.plot(*chord[1:-1].T, "o", color=_COLORS["chord"], ms=5)
    axes.plot(*smooth.T, color=_COLORS["student"], lw=1.8, label=labels["student"])
    axes.plot(*calls.T, "o", color=_COLORS["student"], mec="white", mew=1, ms=8, ls="", label="the student's calls")
    for name, path in (("teacher", teacher), ("chord", chord), ("student", smooth)):
        axes.plot(*path[-1], marker="s", color=_COLORS[name], mec="white", mew=0.8, ms=7)
    axes.annotate("noise", teacher[0], xytext=(8, -3), textcoords="offset points", fontsize=9, color="#5f6368")
    axes.set_title("\n".join(textwrap.wrap(f"“{walked.caption}”", 34)), fontsize=10.5)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.margins(0.12)
    for spine in axes.spines.values():
        spine.set_color("#dadce0")
    axes.set_xlabel("first principal direction", fontsize=8, color="#80868b", labelpad=3)
    axes.set_ylabel("second (stretched)", fontsize=8, color="#80868b", labelpad=3)


def _thumbnail(axes: Axes, image: np.ndarray, color: str, label: str) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_xlabel(label, fontsize=8.5, color="#5f6368", labelpad=4)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(color)
        spine.set_linewidth(2.5)
