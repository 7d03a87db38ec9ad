r"""Tables of a study: published values, recorded runs, differences, and where each number is from.

Two errors belong to a mean over images and seeds, and no table here mixes them. The *image error*
is the standard error over test images, for the networks that were trained: other images of the same
kind would change the mean by about this much. The *seed error* is the standard error over
trainings, from the spread of the seeds' means: training again would change it by about that much.
A claim about two networks needs the first; a claim about two methods needs the second, and a single
seed has none. A standard error from a few seeds is itself uncertain, so that two of them on either
side are no 95 % interval: Student's t asks for 4.30 with three seeds. Cells print
``mean ± image error (95 % over seeds ± half width of the t-interval)``.

A dash stands where no run is recorded. Nothing here computes anything new: all values
are those of ``data/results``.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from scipy.special import stdtrit
from torch import Tensor

from .data import data_folder
from .results import (
    Estimate,
    Result,
    Table,
    format_estimate,
    load_result,
    markdown_table,
    mean_and_se,
)

Study = Mapping[str, Sequence[Result]]


class Pooled(NamedTuple):
    """A mean over images and seeds with its two errors.

    :ivar mean: over all images and seeds.
    :ivar image_se: standard error over images, of the means over seeds.
    :ivar seed_se: standard error over seeds, of the means over images; None for a single seed.
    :ivar num_images: how many images there are.
    :ivar num_seeds: how many seeds.
    """

    mean: float
    image_se: float
    seed_se: float | None
    num_images: int
    num_seeds: int

    @property
    def half_width(self) -> float | None:
        r"""Half of the 95 % t-interval over S seeds; None for a single seed.

        .. math:: t_{0.975,\, S - 1} \cdot \text{seed error}

        >>> round(Pooled(-95.1, 2.25, 0.3, 100, 3).half_width, 3)
        1.291
        """
        if self.seed_se is None:
            return None
        return float(stdtrit(self.num_seeds - 1, 0.975)) * self.seed_se

    def text(self, decimals: int = 2, with_seeds: bool = True) -> str:
        """As the tables print it.

        >>> Pooled(-95.1, 2.25, 0.3, 100, 3).text(), Pooled(-95.1, 2.25, None, 100, 1).text(1)
        ('-95.10 ± 2.25 (95 % over seeds ± 1.29)', '-95.1 ± 2.2 (one seed)')
        """
        text = format_estimate(self.mean, self.image_se, decimals)
        if not with_seeds:
            return text
        width = self.half_width
        seeds = "one seed" if width is None else f"95 % over seeds ± {width:.{decimals}f}"
        return f"{text} ({seeds})"


def pool(values: Sequence[Tensor]) -> Pooled:
    r"""Pool one vector of per-image values for each seed.

    With :math:`v_{sn}` the value of seed s and image n, the image error is that of
    :math:`\frac1S \sum_s v_{sn}` over n, the seed error that of :math:`\frac1N \sum_n v_{sn}` over
    s. Both are as in :func:`amortised.results.mean_and_se`.

    :param values: for each seed a vector ``[N]``, the same images in the same order.
    :raises ValueError: without a seed, or when the seeds have different numbers of images.

    >>> pool([torch.tensor([0.0, 2.0]), torch.tensor([2.0, 4.0])])
    Pooled(mean=2.0, image_se=1.0, seed_se=1.0, num_images=2, num_seeds=2)
    """
    sizes = sorted({len(vector) for vector in values})
    if len(sizes) != 1:
        raise ValueError(f"seeds must have the same images; their numbers of images are {sizes}")
    table = torch.stack([vector.double() for vector in values])
    over_images = mean_and_se(table.mean(0))
    seed_se = mean_and_se(table.mean(1)).se if len(table) > 1 else None
    return Pooled(over_images.mean, over_images.se, seed_se, sizes[0], len(table))


def load_study(
    study: str, scale: str, root: str | Path | None = None, status: str = "done"
) -> dict[str, list[Result]]:
    """All results of a study at one scale, checked, by row and in the order of their seeds.

    :param study: its name.
    :param scale: ``"laptop"``, ``"full"``, ...
    :param root: the folder of all studies; ``data/results`` by default.
    :param status: keep the results of this status.
    :return: ``{row: [result, ...]}``, empty where nothing is recorded.
    :raises amortised.results.ResultError: when a file is damaged.

    >>> load_study("no_such_study", "full")
    {}
    """
    root = data_folder() / "results" if root is None else Path(root)
    found: dict[str, list[Result]] = {}
    for path in sorted((root / study).glob(f"*-{scale}-seed*.json")):
        result = load_result(path)
        if result.record["status"] == status:
            found.setdefault(result.record["row"], []).append(result)
    for results in found.values():
        results.sort(key=lambda result: result.record["seed"])
    return found


def _metric(results: Iterable[Result], metric: str) -> list[Tensor]:
    return [result.per_image[metric] for result in results if metric in result.per_image]


def study_table(
    study: str,
    labels: Mapping[str, str],
    metric: str,
    published: Mapping[str, str] | None = None,
    scales: Sequence[str] = ("full", "laptop"),
    *,
    root: str | Path | None = None,
    decimals: int = 2,
) -> Table:
    """Published beside recorded values of one metric, a row of the study in each line.

    :param study: its name.
    :param labels: ``{row: label}``, in the order of the table.
    :param metric: name of a per-image metric of the results.
    :param published: ``{row: printed value}``; no such column by default.
    :param scales: a column for each.
    :param root: as in :func:`load_study`.
    :param decimals: digits after the point.
    :return: the table, with a dash where no run is recorded and, below, the command that makes it.

    >>> table = study_table("no_such_study", {"vae": "VAE"}, "ais_ll", {"vae": "-80.64"}, ["full"])
    >>> print(table)
    | row | published | full |
    | :-- | :-- | --: |
    | VAE | -80.64 | – |
    <BLANKLINE>
    Runs without a value are made by `python -m amortised.experiments run ... --scale full`.
    """
    loaded = {scale: load_study(study, scale, root) for scale in scales}
    missing, lines = set(), []
    for row, label in labels.items():
        line = [label, *([published.get(row)] if published else [])]
        for scale in scales:
            (text,) = cells(loaded[scale], row, [metric], decimals)
            missing |= {scale} if text is None else set()
            line.append(text)
        lines.append(line)
    header = ["row", *(["published"] if published else []), *scales]
    program = f"python -m amortised.experiments run {study} --scale"
    commands = " and ".join(f"`{program} {scale}`" for scale in scales if scale in missing)
    note = f"\n\nRuns without a value are made by {commands}." if missing else ""
    return Table(markdown_table(header, lines) + note)


def cells(
    results: Study, row: str, metrics: Iterable[str], decimals: int = 2, *, with_seeds: bool = True
) -> list[str | None]:
    """The pooled metrics of a row as texts, None for one that is not recorded.

    :param results: what :func:`load_study` returns.
    :param metrics: names of per-image metrics.
    :param decimals: digits after the point.
    :param with_seeds: print the seed errors, too.

    >>> cells({}, "vae", ["is_ll", "ais_ll"])
    [None, None]
    """
    columns = [_metric(results.get(row, []), metric) for metric in metrics]
    return [pool(column).text(decimals, with_seeds) if column else None for column in columns]


def metric_table(
    results: Study,
    labels: Mapping[str, str],
    metrics: Mapping[str, str],
    decimals: int = 2,
    *,
    with_seeds: bool = True,
    given: Mapping[str, Mapping[str, object]] | None = None,
) -> Table:
    """Several metrics of a study at one scale side by side; a dash where there is no value.

    :param results: what :func:`load_study` returns.
    :param labels: ``{row: label}``, in the order of the table.
    :param metrics: ``{title: per-image metric}``, a column for each.
    :param decimals: digits after the point.
    :param with_seeds: print the seed errors, too; narrower without.
    :param given: ``{title: {row: cell}}``, more columns on the right, for instance published ones.

    >>> print(metric_table({}, {"vae": "VAE"}, {"IS-LL": "is_ll"}))
    | row | IS-LL |
    | :-- | --: |
    | VAE | – |
    """
    more, lines = given or {}, []
    for row, label in labels.items():
        texts = cells(results, row, metrics.values(), decimals, with_seeds=with_seeds)
        lines.append([label, *texts, *(column.get(row) for column in more.values())])
    return markdown_table(["row", *metrics, *more], lines, decimals)


def paired(results: Study, row: str, baseline: str, metric: str) -> tuple[Pooled, list[Estimate]]:
    """``row`` minus ``baseline`` over the same images, seed by seed and pooled.

    :param results: what :func:`load_study` returns.
    :return: the pooled difference, and the paired difference of each seed that both rows have.
    :raises ValueError: when no seed has both rows with this metric.
    """
    a, b = (
        {result.record["seed"]: result.per_image.get(metric) for result in results.get(name, [])}
        for name in (row, baseline)
    )
    seeds = [seed for seed in a if a[seed] is not None and b.get(seed) is not None]
    if not seeds:
        raise ValueError(f"no seed has {metric} for both {row} and {baseline}")
    differences = [a[seed].double() - b[seed].double() for seed in seeds]
    return pool(differences), [mean_and_se(difference) for difference in differences]


def paired_table(
    results: Study,
    pairs: Sequence[tuple[str, str]],
    metric: str,
    labels: Mapping[str, str],
    decimals: int = 2,
    *,
    published: Mapping[str, float] | None = None,
) -> Table:
    """Differences between rows of a study over the same images, in pairs.

    :param results: what :func:`load_study` returns.
    :param pairs: ``(row, baseline)``; pairs without a common seed are shown with dashes.
    :param metric: name of a per-image metric.
    :param labels: ``{row: label}``.
    :param decimals: digits after the point.
    :param published: ``{row: value}`` of some rows, whose differences are a column of their own;
        by default there is none.
    """
    lines = []
    for row, baseline in pairs:
        try:
            pooled, by_seed = paired(results, row, baseline, metric)
            texts = [pooled.text(decimals), "; ".join(f"{e.mean:.{decimals}f}" for e in by_seed)]
        except ValueError:
            texts = [None, None]
        known = {name: float(value) for name, value in (published or {}).items()}
        has_both = row in known and baseline in known
        given = [known[row] - known[baseline] if has_both else None] if published else []
        lines.append([f"{labels[row]} minus {labels[baseline]}", *given, *texts])
    header = ["difference", *(["published"] if published else []), "in pairs", "seed by seed"]
    return markdown_table(header, lines, decimals)


def run_table(results: Study, study: str, labels: Mapping[str, str]) -> Table:
    """Where the numbers come from: file, commit, device and time of each row's runs.

    :param results: what :func:`load_study` returns.
    :param study: its name.
    :param labels: ``{row: label}``; rows without a run are left out.
    :return: for each row the path of its result files, the commits of its runs, their device with
        its threads, and the mean wall time in minutes.
    """
    lines = []
    for row, label in labels.items():
        runs = [result.record for result in results.get(row, [])]
        if not runs:
            continue
        seeds = ",".join(str(run["seed"]) for run in runs)
        seeds = f"{{{seeds}}}" if len(runs) > 1 else seeds
        facts = [run["provenance"] for run in runs]
        commits = {(fact["commit"] or "unknown")[:7] + "*" * bool(fact["dirty"]) for fact in facts}
        devices = {_device(**fact["device"]) for fact in facts}
        minutes = math.fsum(fact["wall_seconds"] for fact in facts) / len(facts) / 60
        path = f"`data/results/{study}/{row}-{runs[0]['scale']}-seed{seeds}.json`"
        lines.append(
            [label, path, *map(", ".join, map(sorted, (commits, devices))), f"{minutes:.1f}"]
        )
    return markdown_table(["row", "files", "commit", "device", "minutes a run"], lines)


def _device(name: str, type: str, threads: int = 1) -> str:
    return name + (f", {threads} threads" if threads > 1 else "")
