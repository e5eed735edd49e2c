"""A problem: a network, its data, and what is computed from one batch of it."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lsweep.errors import LsweepError, nearest
from lsweep.plans.settings import ProblemSource
from lsweep.problems.calling import call, full, split_batch
from lsweep.problems.data import Batch, Split, map_tensors, moved, samples_in, tensors_of
from lsweep.problems.factory import call_factory, describe
from lsweep.problems.losses import (
    Values,
    accuracy,
    flatten,
    ignored_label,
    per_sample,
    whole,
)
from lsweep.problems.means import refuse_broadcast, refuse_squares, refuse_sum
from lsweep.problems.takeover import generators_kept, model_kept

Forward = Callable[[nn.Module, Batch], Mapping[str, Values]]


@dataclass(frozen=True)
class Sampled:
    """One metric on one batch: values [B], weights [B]; ``opaque`` when only a mean is known."""

    values: Tensor
    weights: Tensor
    opaque: bool = False


@dataclass(frozen=True)
class Problem:
    """A network with its data and loss: everything a sweep needs to know about it.

    Args:
        model: any `nn.Module`, at the trained weights; evaluated in eval mode.
        data: split name -> tensors ``(x, y)``, a dict of tensors, a `Dataset`, or a re-iterable
            of batches. The same samples in the same order every time, without augmentation.
        loss: ``loss(output, target)``: a torch loss, or a callable that returns per-sample values
            [B], ``(values, weights)``, or an opaque scalar mean; of values [B, …] a sample has the
            mean.
        metrics: further ``name -> f(output, target)``, each per sample.
        forward: ``forward(model, batch) -> {metric: values or (values, weights)}`` instead of
            ``loss`` and ``metrics``; see `classifier` and `causal_lm`.
        grad: True where computing the loss needs autograd inside (physics-informed networks).
        source: where it came from; `from_factory` fills it in.
        seconds: that its factory took; `from_factory` fills it in.

    Raises:
        LsweepError: data is empty or of an unknown kind, or neither loss nor forward is given.

    >>> net = nn.Linear(2, 2)
    >>> p = Problem(net, {"train": (torch.zeros(3, 2), torch.tensor([0, 1, 1]))},
    ...             loss=nn.CrossEntropyLoss(), metrics={"accuracy": accuracy})
    >>> p.metric_names
    ('loss', 'accuracy')
    """

    model: nn.Module
    data: Mapping[str, Any]
    loss: Callable[..., Any] | None = None
    metrics: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    forward: Forward | None = None
    grad: bool = False
    source: ProblemSource | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise LsweepError(f"model is a {type(self.model).__name__}, not an nn.Module")
        scripted = [
            n for n, m in self.model.named_modules() if isinstance(m, torch.jit.ScriptModule)
        ]
        if scripted:
            raise LsweepError(
                f"{scripted[0] or 'model'} is compiled TorchScript, whose weights cannot be "
                "exchanged: give the nn.Module that it was made from"
            )
        if isinstance(self.model, torch.fx.GraphModule) and "eval" in vars(self.model):  # it raises
            raise LsweepError(
                "model comes from torch.export, which fixes its mode: give the nn.Module that it "
                "was made from"
            )
        if not isinstance(self.data, Mapping) or not self.data:
            raise LsweepError('data must be a dict of splits, such as {"train": (x, y)}')
        if (self.loss is None) == (self.forward is None):
            raise LsweepError("give a Problem either loss=… (and metrics=…) or forward=…")
        if self.forward is not None and self.metrics:
            raise LsweepError(
                "with forward=… its returned dict holds all metrics: leave out metrics="
            )
        if not isinstance(self.metrics, Mapping):
            raise LsweepError('metrics must be a dict, such as {"accuracy": lsweep.accuracy}')
        for name, f in {"loss": self.loss, **self.metrics, "forward": self.forward}.items():
            if isinstance(f, type) and issubclass(f, nn.Module):
                raise LsweepError(
                    f"{name} = {f.__name__} is a class: give what it makes, {f.__name__}(…)"
                )
            if f is not None and not callable(f):
                raise LsweepError(
                    f"{name} = {f!r} cannot be called: give a function or a module, such as "
                    "nn.CrossEntropyLoss()"
                )
        if "loss" in self.metrics:
            raise LsweepError("metrics must not contain 'loss': that is loss=…")
        splits = {n: d if isinstance(d, Split) else Split(n, d) for n, d in self.data.items()}
        object.__setattr__(self, "splits", splits)
        if self.loss is not None:
            functions = {"loss": self.loss, **self.metrics}
            found = {n: per_sample(f) for n, f in functions.items()}
            object.__setattr__(self, "_functions", found)

    splits: dict[str, Split] = field(init=False, repr=False, compare=False)
    _functions: dict[str, Callable[..., Any]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    @classmethod
    def from_factory(cls, factory: str, **options: Any) -> Problem:
        """Make the problem that ``FILE.py:function(**options)`` returns; workers can, too."""
        return make_problem(ProblemSource(factory, options))

    @functools.cached_property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics; a ``forward`` is run on one batch where it does not say."""
        if self.forward is None:
            return tuple(self._functions)
        known = getattr(self.forward, "metrics", None)
        if known:
            return tuple(known)
        split = next(iter(self.splits.values()))
        with generators_kept(), model_kept(self.model), torch.set_grad_enabled(self.grad):
            self.model.eval()
            like = next(self.model.parameters(), torch.empty(0))
            batch = next(iter(split.batches(2)))
            batch = map_tensors(batch, lambda t: moved(t, like.device, like.dtype))
            try:
                found = self.forward(self.model, batch)
                _require_metrics(found)
                return tuple(found)
            except LsweepError:
                raise
            except Exception as e:
                raise LsweepError(f"forward fails on samples of {split.name}: {describe(e)}") from e

    def ignored_label(self, names: tuple[str, ...]) -> int | None:
        """Return the label that is ignored; None unless ``names`` are of classes.

        That is: the plain cross-entropy, and `accuracy` under any name.
        """
        functions = {"loss": _cross_entropy, "accuracy": accuracy}
        if self.forward is not classifier:
            functions = self._functions
        others = {functions.get(name) for name in names} - {functions.get("loss")}
        found = ignored_label(functions["loss"]) if "loss" in functions else None
        return found if others <= {accuracy} else None

    def evaluate(
        self,
        batch: Batch,
        names: tuple[str, ...],
        network: Callable[..., Any] | None = None,
        *,
        graph: bool = False,
    ) -> dict[str, Sampled]:
        """Return the metrics ``names`` on one batch at the model's present weights.

        Args:
            batch: as the split yields it, on the model's device.
            names: which metrics.
            network: called in place of the model.
            graph: values stay attached to the weights, so that they can be differentiated.

        Raises:
            LsweepError: a metric is unknown or not per sample.
        """
        n = samples_in(batch)
        # Not "network or": a compiled module is asked for its length then, and may have none.
        called = self.model if network is None else network
        if self.forward is not None:
            results = self.forward(called, batch)  # type: ignore[arg-type]
            _require_metrics(results)
        else:
            inputs, target = split_batch(batch)
            output = full(call(called, inputs))
            with torch.autocast(_device_type(batch), enabled=False):  # a loss is float32 or better
                results = {
                    m: self._functions[m](output, target) for m in names if m in self._functions
                }
        out = {}
        for name in names:
            if name not in results:
                raise LsweepError(f"no metric {name!r}{nearest(name, results or self._functions)}")
            out[name] = _sampled(results[name], n, name, graph)
        return out

    def check_mean(self, batch: Batch, names: Iterable[str] = ()) -> None:
        """Check on one batch that per-sample values average to the loss as it was given.

        Args:
            batch: on the model's device.
            names: of the metrics that are looked at, too.

        Raises:
            LsweepError: they do not, so Σwv/Σw would be another number than the user's loss; or
                output and target are broadcast to more than either.
        """
        if self.forward is not None:
            with torch.set_grad_enabled(self.grad):
                results = self.forward(self.model, batch)
                again = functools.partial(self.forward, self.model)
                refuse_squares(results, again, batch, samples_in(batch))
        if self.loss is None:
            return
        inputs, target = split_batch(batch)
        reduction = getattr(self.loss, "reduction", None)
        with torch.set_grad_enabled(self.grad), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using a target size")  # it is refused, below
            output = full(call(self.model, inputs))
            with torch.autocast(_device_type(batch), enabled=False):
                for name in [n for n in names if n in self.metrics] + ["loss"]:
                    found = self._functions[name](output, target)
                    refuse_broadcast(name, self._functions[name], found, output, target)
            refuse_sum(self._functions["loss"], found, output, target)
            own = reduction is None and self._functions["loss"] is self.loss
            if own or reduction == "none":
                return
            wanted = float(whole(self.loss, output, target))
            s = _sampled(found, samples_in(batch), "loss")
        found = float((s.weights.double() * s.values.double()).sum() / s.weights.double().sum())
        if wanted == wanted and abs(found - wanted) > 1e-4 * max(1.0, abs(wanted)):
            raise LsweepError(
                f"loss: the weighted mean of its per-sample values is {found:.6g}, but the loss "
                f"itself gives {wanted:.6g}; return (values, weights) from a function of your own"
            )


def make_problem(
    source: ProblemSource, base: Path | None = None, code: Path | None = None, trust: bool = False
) -> Problem:
    """Return the problem that a factory makes; the arguments are those of `call_factory`.

    Raises:
        LsweepError: the factory is missing, raises, or returns something else than a Problem.
    """
    start = time.perf_counter()
    problem = call_factory(source, base, code, trust)
    if not isinstance(problem, Problem):
        raise LsweepError(
            f"the factory {source.factory} returned an object of type "
            f"{type(problem).__name__}, not an lsweep.Problem"
        )
    return replace(problem, source=source, seconds=time.perf_counter() - start)


def _device_type(batch: Batch) -> str:
    return next((t.device.type for t in tensors_of(batch)), "cpu")


def _require_metrics(results: Any) -> None:
    if not isinstance(results, Mapping):
        raise LsweepError(
            f"forward returned a {type(results).__name__}, not {{metric: values}}, such as "
            '{"loss": loss}'
        )


def _sampled(result: Values, n: int, name: str, graph: bool = False) -> Sampled:
    values, weights = result if isinstance(result, tuple) else (result, None)
    if not isinstance(values, Tensor):
        values = torch.as_tensor(values)
    values = values if graph else values.detach()
    if values.is_complex():
        raise LsweepError(f"metric {name!r} is complex: a value is a real number")
    if values.dim() == 0 or (values.numel() == 1 and n > 1 and weights is None):
        if name != "loss":
            raise LsweepError(
                f"metric {name!r} returned one number for a batch of {n} samples. A metric is a "
                "mean over samples; batch values of F1, AUC and other non-means cannot be merged. "
                "Return one value per sample, as lsweep.accuracy does"
            )
        total = torch.tensor(float(n)) if weights is None else weights.detach().double().sum()
        return Sampled(values.reshape(1), total.reshape(1).to(values.device), opaque=True)
    if values.dim() > 1:
        reduced = flatten(values, weights)
        values, weights = reduced if isinstance(reduced, tuple) else (reduced, weights)
    if weights is None:
        if len(values) != n:
            raise LsweepError(
                f"metric {name!r} returned {len(values)} values for a batch of {n} samples: return "
                "one per sample, or (values, weights)"
            )
        weights = torch.ones_like(values)
    weights = weights.detach().to(values.device)
    if weights.shape != values.shape:
        raise LsweepError(
            f"metric {name!r}: weights have shape {tuple(weights.shape)}, "
            f"values {tuple(values.shape)}"
        )
    return Sampled(values, weights)


def classifier(model: nn.Module, batch: Batch) -> dict[str, Values]:
    """Return cross-entropy and accuracy of a classifier, for tuple and dict batches alike.

    Args:
        model: returns logits [B, C], or an object or dict with ``logits``.
        batch: ``(x, y)`` or a dict with ``labels``; labels of -100 are ignored.

    Returns:
        ``loss`` in nats and ``accuracy`` in per cent, per sample.

    >>> classifier(nn.Identity(), (torch.zeros(1, 4), torch.tensor([2])))["loss"][0]
    tensor([1.3863])
    """
    inputs, target = split_batch(batch)
    output = full(call(model, inputs))
    return {"loss": _cross_entropy(output, target), "accuracy": accuracy(output, target)}


def causal_lm(model: nn.Module, batch: Batch) -> dict[str, Values]:
    """Return next-token cross-entropy and accuracy of a language model, weighted by tokens.

    A sample is a sequence: its value is the mean over its predicted tokens and its weight their
    number, so Σwv/Σw is the mean over tokens, while standard errors treat the tokens of one
    sequence as dependent.

    Args:
        model: ``model(input_ids)`` or ``model(input_ids=…)`` returns logits [B, T, V],
            or an object or dict with ``logits``.
        batch: token ids [B, T], or a dict with ``input_ids`` and optionally ``attention_mask``
            and ``labels`` (-100 ignored).

    Returns:
        ``loss`` in nats per token and ``accuracy`` in per cent of tokens.

    >>> causal_lm(lambda ids: torch.zeros(1, 3, 8), torch.tensor([[1, 2, 3]]))["loss"]
    (tensor([2.0794]), tensor([2.]))
    """
    if isinstance(batch, Mapping):
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        if "input_ids" not in batch:
            raise LsweepError(
                f"a dict batch with keys {', '.join(batch)} has no input_ids, which causal_lm "
                "predicts: name them so, or give a forward of your own"
            )
        labels = batch.get("labels", batch["input_ids"])
        if "labels" not in batch and "attention_mask" in batch:
            labels = torch.where(batch["attention_mask"].bool(), labels, -100)
    else:
        inputs = batch[0] if isinstance(batch, list | tuple) else batch
        labels = inputs
    logits = full(call(model, inputs))[:, :-1].transpose(1, 2)  # [B, V, T-1]
    target = labels[:, 1:]
    return {"loss": _cross_entropy(logits, target), "accuracy": accuracy(logits, target)}


classifier.metrics = causal_lm.metrics = ("loss", "accuracy")  # type: ignore[attr-defined]
_cross_entropy = per_sample(nn.CrossEntropyLoss())
