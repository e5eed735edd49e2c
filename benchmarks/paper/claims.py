"""What is claimed, by which statistic it is judged, and the thresholds: fixed before measuring.

Nothing here is changed after a run was seen; what does not reproduce is reported as such. Figures
are those of Li et al., *Visualizing the Loss Landscape of Neural Nets*, NeurIPS 2018, on CIFAR-10;
the ones that were not read in a source again are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SEEDS = (0, 1, 2)
DEPTHS = (6, 14, 24)  # linear layers of the plain and the residual networks
WIDTHS = (16, 32, 64, 128)
SMALL_BATCH, LARGE_BATCH = 25, 500  # of 1000 images
DECAY = 1e-3
EPOCHS = 100  # of the runs that are compared at the same number of epochs
UNDERFITTED = 10  # epochs of the networks whose losses are deliberately not matched
STEPS = 40  # checkpoints of a trajectory
DIRECTIONS = 10  # planes at least
RADIUS = 0.2
PLANE = 25  # points along a side of the plane that non-convexity is read from
SADDLE_STEP = 1e-3  # of the central differences at the centre, in filter-normalised units


@dataclass(frozen=True)
class Claim:
    """One row of the table before anything is measured.

    Attributes:
        key: what evidence refers to.
        text: what is claimed.
        paper: the paper's figure, or what it says without one.
        statistic: what is computed here.
        threshold: the rule, with ``limits`` filled in.
        limits: the numbers of the rule.
    """

    key: str
    text: str
    paper: str
    statistic: str
    rule: str
    limits: Mapping[str, float] = field(default_factory=dict)

    @property
    def threshold(self) -> str:
        """The rule in words, with its numbers."""
        return self.rule.format(**self.limits)


NC, RISE = "nc10", "rise at 0.2"
LEGEND = f"""\
*nc10*: share of a {PLANE} x {PLANE} plane (r ≤ 1, filter-normalised, training loss) where the
plane's Hessian has -λmin > 0.1 max|λ|. *rise at r*: of the training loss at filter-normalised
radius r, mean over both ends of the {2 * DIRECTIONS} directions of {DIRECTIONS} random planes.
*matched*: the largest training loss is at most twice the smallest. Curvature is over the weights
that such a direction moves (no biases, no normalisation), at the centre. Measured numbers are the
mean and, in brackets, the range over training seeds."""
PAPER = (
    Claim(
        "depth-plain",
        "Depth makes plain networks non-convex",
        "ResNet-noshort 20, 56, 110: from nearly convex to chaotic",
        f"{NC}, plain, depth 6, 14, 24, matched loss",
        "depth 24 at least {rough} in every seed; means increase with depth",
        {"rough": 0.10},
    ),
    Claim(
        "depth-skip",
        "... and residual ones not",
        "ResNet 20, 56, 110: no chaos",
        f"{NC}, skip, depth 6, 14, 24, matched loss",
        "at most {smooth} at every depth in every seed",
        {"smooth": 0.05},
    ),
    Claim(
        "depth-error",
        "Depth hurts the test error of plain networks",
        "110 layers: 16.44 % plain, 5.79 % residual",
        "mean test error at depth 24, plain less skip, in points",
        "more than {gap}",
        {"gap": 1.5},
    ),
    Claim(
        "depth-rise",
        "Residual minima are flatter than plain ones of the same depth",
        'skip connections "promote flat minimizers"',
        f"{RISE}, plain over skip at depth 24, matched loss",
        "at least {ratio} in every seed",
        {"ratio": 1.5},
    ),
    Claim(
        "batch-matched",
        "Large batches end in sharper minima",
        'sharper, "although not dramatically"',
        f"{RISE}, batch 500 over batch 25, no decay, both stopped at loss 0.02",
        "at least {ratio} in every seed",
        {"ratio": 1.5},
    ),
    Claim(
        "batch-unmatched",
        "... the same at equal epochs (loss NOT matched)",
        "the paper trains for equal epochs",
        f"{RISE}, batch 500 over batch 25, 100 epochs, with and without decay",
        "at least {ratio} in every seed",
        {"ratio": 5.0},
    ),
    Claim(
        "batch-error",
        "Large batches generalise worse",
        "VGG-9: 7.37 → 11.07 %; with decay 6.00 → 10.19 %",
        "mean test error, batch 500 less 25, stopped at loss 0.02, in points",
        "at least {gap}",
        {"gap": 1.0},
    ),
    Claim(
        "decay-norm",
        "Without decay the large batch has the smaller weights, with decay the larger",
        "histograms of VGG-9's weights",
        "‖θ‖ over weights that move, batch 500 over batch 25, 100 epochs",
        "below 1 without decay and above 1 with it, in every seed",
    ),
    Claim(
        "decay-raw",
        "Weight decay moves raw curvature",
        "apparent sharpness follows the scale of the weights",
        "λmax of the Hessian, decay 1e-3 over none, batch 25, loss matched to that of decay",
        "mean ratio at least {ratio}",
        {"ratio": 3.0},
    ),
    Claim(
        "decay-raw-unmatched",
        "... the same at equal epochs (loss NOT matched)",
        "as above",
        "λmax of the Hessian, decay 1e-3 over none, batch 25, 100 epochs",
        "at least {ratio} in every seed",
        {"ratio": 20.0},
    ),
    Claim(
        "decay-filter",
        "... but hardly the filter-normalised sharpness",
        "filter-normalised plots show no such reversal",
        f"{RISE}, decay 1e-3 over none, batch 25, loss matched to that of decay",
        "between {low} and {high} in every seed",
        {"low": 0.5, "high": 2.5},
    ),
    Claim(
        "decay-filter-unmatched",
        "... the same at equal epochs (loss NOT matched)",
        "as above",
        f"{RISE}, decay 1e-3 over none, batch 25, 100 epochs",
        "between {low} and {high} in every seed",
        {"low": 0.5, "high": 2.5},
    ),
    Claim(
        "decay-widths",
        "Weight decay moves the widths of 1-D interpolation",
        "the small batch looks wide without decay and sharp with it",
        "width to a rise of 0.5 on the line between them, batch 25 over 500",
        "with decay the ratio falls by at least {factor} in every seed",
        {"factor": 2.0},
    ),
    Claim(
        "decay-reversal",
        "... so far that it turns round",
        "the small batch looks sharper with decay",
        "the same widths with decay, batch 25 over 500",
        "below 1 in every seed",
    ),
    Claim(
        "width-rise",
        "Width flattens",
        "WRN-56 k = 1 to 8: wider minima",
        f"{RISE}, plain, depth 14, width 128 over 16, matched loss",
        "at most {ratio} in every seed; means fall with width",
        {"ratio": 0.67},
    ),
    Claim(
        "width-nc",
        "Width makes plain networks convex",
        "WRN-56-noshort: k = 1 chaotic, k = 8 not",
        f"{NC}, plain, depth 14, width 16, 32, 64, 128, matched loss",
        "width 128 at most {ratio} of width 16 in every seed",
        {"ratio": 0.5},
    ),
    Claim(
        "width-error",
        "... and generalises better",
        "WRN-56-noshort: 13.31 → 8.70 %; with skip 5.89 → 3.93 % (k = 1, 8)",
        "mean test error, width 16 less width 128, in points",
        "at least {gap}",
        {"gap": 1.0},
    ),
    Claim(
        "layer-equivalent",
        "Layer normalisation is less faithful than filter: equivalent networks",
        "filter normalisation removes the scale of filters",
        "max\\|ΔL\\| over the range of a line (r ≤ 0.5), when filters before batch norm are scaled "
        "by 2^u, u in [-2, 2], the statistics carried along",
        "filter at most {same}, layer at least {other}, in every seed",
        {"same": 0.01, "other": 0.1},
    ),
    Claim(
        "layer-order",
        "... : order against test error",
        "layer-normalised plots do not follow the test error as well",
        "Kendall τ of the rise at r = 0.2 with the test error over the 12 networks of batch and "
        "decay, filter less layer",
        "more than {gap}",
        {"gap": 0.1},
    ),
    Claim(
        "planes-alike",
        "Ten random planes look alike",
        "different directions give nearly the same plot",
        "coefficient of variation over ten planes of the rise at r = 0.2, depth 24",
        "at most {cv} in every network",
        {"cv": 0.5},
    ),
    Claim(
        "saddle-random",
        "Random planes do not show that the centre is a saddle",
        "principal curvatures of a plane are averages of the full ones",
        "GELU networks of depth 24 with λmin < -0.01 λmax: of ten random planes, those with "
        "negative curvature at the centre (second differences, r = 0.001)",
        "at most {most} of ten in every such network",
        {"saddle": 0.01, "most": 1},
    ),
    Claim(
        "saddle-hessian",
        "... and the Hessian's own plane does",
        "the paper's maps of λmin/λmax",
        "the same networks: smaller curvature at the centre of the plane of the top and the bottom "
        "eigenvector, over λmin",
        "negative in every such network",
        {"saddle": 0.01},
    ),
    Claim(
        "saddle-relu",
        "... nor do random directions of ReLU networks",
        "as above",
        "networks of depth 24 with λmin < -0.01 λmax: of 20 random filter-normalised directions, "
        "those with dᵀHd < 0 (exact products: second differences see where ReLUs switch)",
        "at most {most} of 20 in every such network",
        {"saddle": 0.01, "most": 2},
    ),
    Claim(
        "pca-share",
        "Two components hold 40 to 90 % of a trajectory",
        "40 to 90 %",
        "share of two components over 41 checkpoints, plain and skip, depth 14",
        "between {low} and {high} in every seed",
        {"low": 0.40, "high": 0.90},
    ),
    Claim(
        "pca-null",
        "... as a random walk has too",
        "not in the paper; 76 % (Antognini and Sohl-Dickstein 2018)",
        "the same share of a random walk of 41 steps in the weights of the same network",
        "{null} ± {margin}",
        {"null": 0.76, "margin": 0.02},
    ),
    Claim(
        "regression-half",
        "Designed failure: sharpness at r = 0.5 with unmatched loss",
        "not in the paper",
        "rise at r = 0.5, plain over skip at depth 24, both after 10 epochs",
        "the wrong order: below 1 in every seed",
    ),
    Claim(
        "regression-one",
        "Designed failure: sharpness at r = 1 with unmatched loss",
        "not in the paper",
        "rise at r = 1, plain over skip at depth 24, both after 10 epochs",
        "the wrong order: below 1 in every seed",
    ),
)
BEYOND = (
    Claim(
        "sam",
        "SAM ends in flatter minima than SGD",
        "Chen et al. 2022 (arXiv 2106.01548)",
        f"{RISE}, SAM (ρ = 0.05) over SGD, same network, matched loss",
        "at most {ratio} in every seed, for the residual MLP and the transformer",
        {"ratio": 0.8},
    ),
    Claim(
        "vit-saddle",
        "A vision transformer's landscape is not convex",
        "Park and Kim 2022 (arXiv 2202.06709): negative Hessian eigenvalues",
        "λmin/λmax at the centre, transformer",
        "below -{saddle} in every seed",
        {"saddle": 0.01},
    ),
    Claim(
        "vit-sharp",
        "A transformer and a Mixer are sharper than a residual CNN",
        "Chen et al. 2022 (arXiv 2106.01548)",
        f"{RISE}, transformer and Mixer over the CNN, matched loss",
        "at least {ratio} in every seed",
        {"ratio": 1.5},
    ),
)
