"""Each claim against what was measured: the numbers over all seeds, and whether they agree."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from .claims import BEYOND, DECAY, LARGE_BATCH, PAPER, SMALL_BATCH, Claim

Measured = Mapping[str, Sequence[Mapping[str, Mapping[str, Any]]]]
"""study -> for each seed: network -> its numbers."""


@dataclass(frozen=True)
class Found:
    """What was measured for a claim; ``agrees`` is None where nothing can be said."""

    text: str
    agrees: bool | None
    seeds: int


Judge = Callable[[Claim, Measured], Found]
JUDGES: dict[str, Judge] = {}


def judges(key: str) -> Callable[[Judge], Judge]:
    """Register what judges the claim ``key``."""

    def register(judge: Judge) -> Judge:
        JUDGES[key] = judge
        return judge

    return register


def span(values: Iterable[float]) -> str:
    """Return the mean and the range.

    >>> span([0.25, 0.35])
    '0.3 (0.25 to 0.35)'
    """
    v = list(values)
    return f"{mean(v):.3g} ({min(v):.3g} to {max(v):.3g})"


def each(measured: Measured, study: str, network: str, name: str) -> list[float]:
    """Return one number for each seed."""
    return [float(records[network][name]) for records in measured[study]]


def ratios(measured: Measured, study: str, over: str, under: str, name: str) -> list[float]:
    """Return a ratio for each seed."""
    pairs = zip(each(measured, study, over, name), each(measured, study, under, name), strict=True)
    return [a / b for a, b in pairs]


def networks(measured: Measured, study: str) -> list[str]:
    """Return the names of a study's networks, in order."""
    return list(measured[study][0])


def losses(measured: Measured, study: str, *names: str) -> str:
    """Return between which training losses the networks lie: whether they are matched."""
    every = [loss for n in names for loss in each(measured, study, n, "train_loss")]
    how = "matched" if max(every) <= 2 * min(every) else "NOT matched"
    return f"training loss {min(every):.3g} to {max(every):.3g}: {how}"


def deep(measured: Measured, kind: str, at: int = -1) -> str:
    """Return the name of the deepest network of a kind."""
    return [n for n in networks(measured, "depth") if n.startswith(kind)][at]


@judges("depth-plain")
def depth_plain(claim: Claim, measured: Measured) -> Found:
    """Non-convexity of plain networks grows with depth."""
    names = [n for n in networks(measured, "depth") if n.startswith("plain")]
    by_depth = [each(measured, "depth", n, "nc10") for n in names]
    means = [mean(v) for v in by_depth]
    grows = all(a < b for a, b in itertools.pairwise(means))
    text = "; ".join(f"{n.split()[1]}: {span(v)}" for n, v in zip(names, by_depth, strict=True))
    text += f"; {losses(measured, 'depth', *names)}"
    agrees = grows and min(by_depth[-1]) >= claim.limits["rough"]
    return Found(text, agrees, len(by_depth[-1]))


@judges("depth-skip")
def depth_skip(claim: Claim, measured: Measured) -> Found:
    """Non-convexity of residual networks does not."""
    names = [n for n in networks(measured, "depth") if n.startswith("skip")]
    by_depth = [each(measured, "depth", n, "nc10") for n in names]
    text = "; ".join(f"{n.split()[1]}: {span(v)}" for n, v in zip(names, by_depth, strict=True))
    text += f"; {losses(measured, 'depth', *names)}"
    agrees = max(v for values in by_depth for v in values) <= claim.limits["smooth"]
    return Found(text, agrees, len(by_depth[-1]))


@judges("depth-error")
def depth_error(claim: Claim, measured: Measured) -> Found:
    """Test error of the deepest plain network and the deepest residual one."""
    plain, skip = (
        each(measured, "depth", deep(measured, k), "test_error") for k in ("plain", "skip")
    )
    gap = mean(plain) - mean(skip)
    text = f"plain {span(plain)} %, skip {span(skip)} %: {gap:+.2g}"
    return Found(text, gap > claim.limits["gap"], len(plain))


@judges("depth-rise")
def depth_rise(claim: Claim, measured: Measured) -> Found:
    """Sharpness of the deepest plain network over that of the deepest residual one."""
    plain, skip = deep(measured, "plain"), deep(measured, "skip")
    ratio = ratios(measured, "depth", plain, skip, "rise")
    text = f"{span(ratio)}; {losses(measured, 'depth', plain, skip)}"
    return Found(text, min(ratio) >= claim.limits["ratio"], len(ratio))


@judges("batch-matched")
def batch_matched(claim: Claim, measured: Measured) -> Found:
    """Sharpness of large over small batch at the same training loss."""
    small, large = f"batch {SMALL_BATCH}", f"batch {LARGE_BATCH}"
    ratio = ratios(measured, "batch", large, small, "rise")
    text = f"{span(ratio)}; {losses(measured, 'batch', small, large)}"
    return Found(text, min(ratio) >= claim.limits["ratio"], len(ratio))


@judges("batch-error")
def batch_error(claim: Claim, measured: Measured) -> Found:
    """Test error of large and small batch at the same training loss."""
    small = each(measured, "batch", f"batch {SMALL_BATCH}", "test_error")
    large = each(measured, "batch", f"batch {LARGE_BATCH}", "test_error")
    gap = mean(large) - mean(small)
    text = f"batch {SMALL_BATCH} {span(small)} %, {LARGE_BATCH} {span(large)} %: {gap:+.2g}"
    return Found(text, gap >= claim.limits["gap"], len(small))


def both(samples: int) -> tuple[str, str]:
    """Return the names of one batch size without and with weight decay."""
    return f"batch {samples} decay 0", f"batch {samples} decay {DECAY:g}"


@judges("batch-unmatched")
def batch_unmatched(claim: Claim, measured: Measured) -> Found:
    """Sharpness of large over small batch after the same number of epochs."""
    pairs = list(zip(both(LARGE_BATCH), both(SMALL_BATCH), strict=True))
    found = [ratios(measured, "decay", large, small, "rise") for large, small in pairs]
    names = [n for pair in pairs for n in pair]
    text = f"without decay {span(found[0])}, with {span(found[1])}; "
    text += losses(measured, "decay", *names)
    agrees = min(found[0] + found[1]) >= claim.limits["ratio"]
    return Found(text, agrees, len(found[0]))


@judges("decay-norm")
def decay_norm(claim: Claim, measured: Measured) -> Found:
    """Weight norms of large over small batch."""
    without, with_decay = (
        ratios(measured, "decay", large, small, "weight_norm")
        for large, small in zip(both(LARGE_BATCH), both(SMALL_BATCH), strict=True)
    )
    text = f"without decay {span(without)}, with {span(with_decay)}"
    return Found(text, max(without) < 1 < min(with_decay), len(without))


def decayed(measured: Measured, name: str, matched: bool) -> tuple[list[float], str]:
    """Return a number with weight decay over the same without, and their losses."""
    without, with_decay = both(SMALL_BATCH)
    without = "matched decay 0" if matched else without
    ratio = ratios(measured, "decay", with_decay, without, name)
    return ratio, f"{span(ratio)}; {losses(measured, 'decay', without, with_decay)}"


@judges("decay-raw")
def decay_raw(claim: Claim, measured: Measured) -> Found:
    """Raw curvature at matched loss."""
    ratio, text = decayed(measured, "hessian_max", matched=True)
    return Found(text, mean(ratio) >= claim.limits["ratio"], len(ratio))


@judges("decay-raw-unmatched")
def decay_raw_unmatched(claim: Claim, measured: Measured) -> Found:
    """Raw curvature after the same number of epochs."""
    ratio, text = decayed(measured, "hessian_max", matched=False)
    return Found(text, min(ratio) >= claim.limits["ratio"], len(ratio))


@judges("decay-filter")
@judges("decay-filter-unmatched")
def decay_filter(claim: Claim, measured: Measured) -> Found:
    """Filter-normalised sharpness, at matched loss or after the same number of epochs."""
    ratio, text = decayed(measured, "rise", matched=claim.key == "decay-filter")
    agrees = claim.limits["low"] <= min(ratio) and max(ratio) <= claim.limits["high"]
    return Found(text, agrees, len(ratio))


def asymmetry(measured: Measured, amount: float) -> list[float]:
    """Return the width at the small batch over that at the large one."""
    name = f"line decay {amount:g}"
    start, end = (each(measured, "decay", name, f"width_{w}") for w in ("start", "end"))
    return [a / b for a, b in zip(start, end, strict=True)]


@judges("decay-widths")
def decay_widths(claim: Claim, measured: Measured) -> Found:
    """How much weight decay changes which minimum looks wider."""
    without, with_decay = asymmetry(measured, 0.0), asymmetry(measured, DECAY)
    fall = [a / b for a, b in zip(without, with_decay, strict=True)]
    text = f"without decay {span(without)}, with {span(with_decay)}: falls by {span(fall)}"
    return Found(text, min(fall) >= claim.limits["factor"], len(fall))


@judges("decay-reversal")
def decay_reversal(claim: Claim, measured: Measured) -> Found:
    """Whether the small batch looks sharper with weight decay."""
    with_decay = asymmetry(measured, DECAY)
    return Found(span(with_decay), max(with_decay) < 1, len(with_decay))


def widths(measured: Measured, name: str) -> list[list[float]]:
    """Return one number for each width and seed, and how the training losses lie."""
    return [each(measured, "width", n, name) for n in networks(measured, "width")]


def by_width(measured: Measured, name: str) -> str:
    """Return a number for each width in words."""
    names = networks(measured, "width")
    text = "; ".join(
        f"{n.split()[1]}: {span(v)}" for n, v in zip(names, widths(measured, name), strict=True)
    )
    return f"{text}; {losses(measured, 'width', *names)}"


@judges("width-rise")
def width_rise(claim: Claim, measured: Measured) -> Found:
    """Sharpness over width."""
    found = widths(measured, "rise")
    means = [mean(v) for v in found]
    falls = all(a > b for a, b in itertools.pairwise(means))
    most = max(b / a for a, b in zip(found[0], found[-1], strict=True))
    return Found(by_width(measured, "rise"), falls and most <= claim.limits["ratio"], len(found[0]))


@judges("width-nc")
def width_nc(claim: Claim, measured: Measured) -> Found:
    """Non-convexity over width."""
    found = widths(measured, "nc10")
    agrees = all(b <= claim.limits["ratio"] * a for a, b in zip(found[0], found[-1], strict=True))
    return Found(by_width(measured, "nc10"), agrees, len(found[0]))


@judges("width-error")
def width_error(claim: Claim, measured: Measured) -> Found:
    """Test error over width."""
    found = widths(measured, "test_error")
    gap = mean(found[0]) - mean(found[-1])
    text = f"{by_width(measured, 'test_error')}; {gap:+.2g}"
    return Found(text, gap >= claim.limits["gap"], len(found[0]))


@judges("layer-equivalent")
def layer_equivalent(claim: Claim, measured: Measured) -> Found:
    """How far pictures of the same function differ."""
    filter_, layer, output = (
        each(measured, "equivalent", "rescaled", n)
        for n in ("defect_filter", "defect_layer", "output_change")
    )
    text = f"filter {span(filter_)}, layer {span(layer)}; outputs differ by {max(output):.1g}"
    agrees = max(filter_) <= claim.limits["same"] and min(layer) >= claim.limits["other"]
    return Found(text, agrees, len(filter_))


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Kendall's τ without ties: the mean of sign(Δa)·sign(Δb) over pairs.

    >>> kendall([1, 2, 3], [1, 3, 2])
    0.3333333333333333
    """
    pairs = [(i, j) for i in range(len(a)) for j in range(i)]
    return mean((1 if (a[i] - a[j]) * (b[i] - b[j]) > 0 else -1) for i, j in pairs)


@judges("layer-order")
def layer_order(claim: Claim, measured: Measured) -> Found:
    """Whether layer-normalised sharpness orders networks less well by their test error."""
    names = [*both(SMALL_BATCH), *both(LARGE_BATCH)]
    columns = {
        name: [v for n in names for v in each(measured, "decay", n, name)]
        for name in ("rise", "rise_layer", "test_error")
    }
    of_filter = kendall(columns["rise"], columns["test_error"])
    of_layer = kendall(columns["rise_layer"], columns["test_error"])
    text = f"τ filter {of_filter:.2f}, layer {of_layer:.2f}, {len(columns['rise'])} networks"
    text += f"; {losses(measured, 'decay', *names)}"
    return Found(text, of_filter - of_layer > claim.limits["gap"], len(measured["decay"]))


@judges("planes-alike")
def planes_alike(claim: Claim, measured: Measured) -> Found:
    """Variation over planes."""
    plain, skip = (each(measured, "depth", deep(measured, k), "rise_cv") for k in ("plain", "skip"))
    text = f"plain {span(plain)}, skip {span(skip)}"
    return Found(text, max(plain + skip) <= claim.limits["cv"], len(plain))


def saddles(measured: Measured, study: str, least: float) -> list[Mapping[str, Any]]:
    """Return the deepest networks that have an eigenvalue far enough below zero."""
    deepest = max(int(n.split()[1]) for n in networks(measured, study))
    found = [r for records in measured[study] for n, r in records.items() if f" {deepest}" in n]
    return [r for r in found if r["hessian_min"] < -least * r["hessian_max"]]


def counted(claim: Claim, measured: Measured, study: str, what: str) -> Found:
    """Judge how many of the random planes or directions curve downwards where the Hessian does."""
    at = saddles(measured, study, claim.limits["saddle"])
    if not at:
        return Found("no network has such an eigenvalue", None, len(measured[study]))
    negative = [r[f"{what}_negative"] for r in at]
    lowest = [r["hessian_min"] / r["hessian_max"] for r in at]
    text = f"{sum(negative)} of {sum(r[what] for r in at)}, most {max(negative)} of one network; "
    text += f"{len(at)} networks, λmin/λmax {span(lowest)}"
    return Found(text, max(negative) <= claim.limits["most"], len(measured[study]))


@judges("saddle-random")
def saddle_random(claim: Claim, measured: Measured) -> Found:
    """How many random planes curve downwards."""
    return counted(claim, measured, "smooth", "planes")


@judges("saddle-relu")
def saddle_relu(claim: Claim, measured: Measured) -> Found:
    """How many random directions of ReLU networks curve downwards."""
    return counted(claim, measured, "depth", "directions")


@judges("saddle-hessian")
def saddle_hessian(claim: Claim, measured: Measured) -> Found:
    """Whether the Hessian's own plane curves downwards there."""
    at = saddles(measured, "smooth", claim.limits["saddle"])
    if not at:
        return Found("no network has such an eigenvalue", None, len(measured["smooth"]))
    curvature = [r["hessian_plane_curvature"] for r in at]
    over = [c / r["hessian_min"] for c, r in zip(curvature, at, strict=True)]
    text = (
        f"negative in {sum(c < 0 for c in curvature)} of {len(at)} networks; over λmin {span(over)}"
    )
    return Found(text, max(curvature) < 0, len(measured["smooth"]))


@judges("pca-share")
def pca_share(claim: Claim, measured: Measured) -> Found:
    """The share of two components of a trajectory, beside what a random walk has."""
    plain, skip = (each(measured, "trajectory", k, "share") for k in ("plain", "skip"))
    null = each(measured, "trajectory", "plain", "null")[0]
    text = f"plain {span(plain)}, skip {span(skip)}; null beside it {null:.3f}"
    agrees = claim.limits["low"] <= min(plain + skip) <= max(plain + skip) <= claim.limits["high"]
    return Found(text, agrees, len(plain))


@judges("pca-null")
def pca_null(claim: Claim, measured: Measured) -> Found:
    """The same share of a random walk."""
    walk = each(measured, "trajectory", "walk", "share")
    far = max(abs(w - claim.limits["null"]) for w in walk)
    return Found(span(walk), far <= claim.limits["margin"], len(walk))


@judges("regression-half")
@judges("regression-one")
def regression(claim: Claim, measured: Measured) -> Found:
    """Sharpness that must not be trusted: losses differ."""
    name = "rise_at_0.5" if claim.key == "regression-half" else "rise_at_1"
    ratio = ratios(measured, "unmatched", "plain", "skip", name)
    plain, skip = (each(measured, "unmatched", k, "nc10") for k in ("plain", "skip"))
    text = f"{span(ratio)}; non-convex plain {span(plain)}, skip {span(skip)}; "
    return Found(text + losses(measured, "unmatched", "plain", "skip"), max(ratio) < 1, len(ratio))


@judges("sam")
def sam(claim: Claim, measured: Measured) -> Found:
    """Sharpness after SAM over that after SGD."""
    mlp = ratios(measured, "beyond", "MLP, SAM", "MLP, ReLU", "rise")
    vit = ratios(measured, "beyond", "transformer, SAM", "transformer", "rise")
    text = f"MLP {span(mlp)}, transformer {span(vit)}; "
    text += losses(measured, "beyond", "MLP, SAM", "MLP, ReLU", "transformer, SAM", "transformer")
    return Found(text, max(mlp + vit) <= claim.limits["ratio"], len(mlp))


@judges("vit-saddle")
def vit_saddle(claim: Claim, measured: Measured) -> Found:
    """The most negative eigenvalue of the transformer."""
    low, high = (
        each(measured, "beyond", "transformer", f"hessian_{end}") for end in ("min", "max")
    )
    ratio = [a / b for a, b in zip(low, high, strict=True)]
    return Found(span(ratio), max(ratio) < -claim.limits["saddle"], len(ratio))


@judges("vit-sharp")
def vit_sharp(claim: Claim, measured: Measured) -> Found:
    """Sharpness of transformer and Mixer over that of the CNN."""
    vit, mixer = (ratios(measured, "beyond", n, "CNN", "rise") for n in ("transformer", "Mixer"))
    text = f"transformer {span(vit)}, Mixer {span(mixer)}; "
    text += losses(measured, "beyond", "transformer", "Mixer", "CNN")
    return Found(text, min(vit + mixer) >= claim.limits["ratio"], len(vit))


def judge(claims: Sequence[Claim], measured: Measured) -> list[Found]:
    """Judge each claim."""
    return [JUDGES[claim.key](claim, measured) for claim in claims]


assert set(JUDGES) == {c.key for c in PAPER + BEYOND}
