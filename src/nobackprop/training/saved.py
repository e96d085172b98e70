"""Trained nets: written beside each record, loaded with `nobackprop.load`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor

from nobackprop import rules
from nobackprop.core.losses import Loss
from nobackprop.core.network import Network, subclasses
from nobackprop.core.rule import Rule
from nobackprop.data.given import as_images, images_of, tensor_of
from nobackprop.data.pixels import Pixels
from nobackprop.data.sources import Dataset, Images, Source
from nobackprop.mistakes import Missing, Mistake, Unknown
from nobackprop.records.identity import before, recorded_name
from nobackprop.training import sealed
from nobackprop.training.metrics import Scores


@dataclass(frozen=True)
class Trained:
    """A net with its best weights, as `nobackprop.load` gives it. Labels are the data set's own class numbers.

    Images are like those it was trained on, uint8 or, with `pixels.floats`, floats: tensors or arrays of shape
    (N, C, H, W), or what `nobackprop.train(data=...)` takes as such, (N, D) and (N, H, W).
    """

    net: Network
    rule: Rule
    weights: dict[str, Tensor] = field(repr=False)
    loss: Loss
    pixels: Pixels
    classes: tuple[int, ...]

    @torch.no_grad()
    def logits(self, images: Any) -> Tensor:
        """The rule's prediction for images: logits (N, outputs).

        Raises Mistake for images of another type or shape.
        """
        return self.rule.logits(self.net, self.weights, self._inputs(images))

    @torch.no_grad()
    def activations(self, images: Any) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """All pre-activations z[0..L] and activations h[0..L-1], as `Network.forward` gives them."""
        return self.net.forward(self.weights, self._inputs(images))

    def predict(self, images: Any) -> Tensor:
        """The most likely class of each image, (N,), among the classes it was trained on."""
        return torch.tensor(self.classes)[self.loss.predict(self.logits(images))]

    def evaluate(self, images: Any) -> dict[str, float]:
        """Loss, accuracy and (with more than five classes) top-5 accuracy on the images of its classes.

        They are the `train` or `test` of a loaded data set, a pair (x, y) of tensors or arrays, or a torch Dataset of
        such pairs. Raises Mistake for anything else, where the shape differs, and where none of the images is of a
        class it knows.
        """
        if isinstance(images, Dataset | Source):
            raise Mistake("evaluate takes the images of one part: write .test or .train, as in Digits().load().test")
        if not isinstance(images, Images):
            images = images_of(images, "images")
        labels = torch.full_like(images.labels, -1)
        for label, number in enumerate(self.classes):
            labels[images.labels == number] = label
        known = (labels >= 0).nonzero().squeeze(1)
        if not len(known):
            raise Mistake(f"none of these images is of a class that the net knows: {list(self.classes)}")
        scores = Scores(self.loss, seeds=1)
        for part in known.split(1000):
            scores.update(self.logits(images.pixels[part]).unsqueeze(0), labels[part].unsqueeze(0))
        return {name: value.item() for name, value in scores.compute().items()}

    def _inputs(self, images: Any) -> Tensor:
        given = images if isinstance(images, Tensor) else tensor_of(images, "images")
        x = as_images(given) if given.ndim in (2, 3) else given
        fits = x.is_floating_point() if self.pixels.floats else x.dtype == torch.uint8
        if not fits or tuple(x.shape[1:]) != self.net.in_shape:
            kind = "floats" if self.pixels.floats else torch.uint8
            raise Mistake(
                f"got images of type {given.dtype} and shape {tuple(given.shape)}: this net takes {kind} of shape "
                f"(N, {', '.join(map(str, self.net.in_shape))})"
            )
        return self.pixels(x, self.weights["W1"].dtype)


def save(
    path: Path,
    net: Network,
    rule: Rule,
    weights: Mapping[str, Tensor],
    loss: Loss,
    pixels: Pixels,
    classes: tuple[int, ...],
) -> None:
    """Writes a trained net as tensors and plain data, atomically."""
    content = {
        "net": net.describe(),
        "rule": _described(rule),
        "weights": {name: t.clone() for name, t in weights.items()},
        "loss": _described(loss),
        "pixels": asdict(pixels),
        "classes": list(classes),
    }
    sealed.write(path, content)


def _described(component: Rule | Loss) -> dict[str, Any]:
    return {"class": _full_name(type(component)), "fields": asdict(component)}


def _full_name(kind: type) -> str:
    """The value as records have it."""
    return recorded_name(f"{kind.__module__}.{kind.__qualname__}")


def _made(base: Any, name: str, fields: Mapping[str, Any], path: Path) -> Any:
    """A rule or loss by its class's name and fields. Only classes of this package, or imported already, are made.

    Raises Unknown for any other class, and for one that takes other hyper-parameters now.
    """
    for module in iter_modules(rules.__path__, f"{rules.__name__}."):
        import_module(module.name)
    if (kind := {_full_name(kind): kind for kind in subclasses(base)}.get(name)) is None:
        raise Unknown(f"{path} was trained with {name}, which is not in nobackprop: import it first")
    try:
        return kind(**{**before(kind), **fields})
    except TypeError as e:
        raise Unknown(f"{path} was trained with another version of {name}: {e}") from e


def load(run_folder: str | Path) -> Trained:
    """The trained net of a seed's folder, such as `runs/lra_e_mlp_mnist-0123456789ab/seed0`, or of a run with one seed;
    a path to best.pt itself will do.

    Nothing in the folder is run or unpickled. Raises Missing, which lists the folders that exist, where there is no
    trained net. Raises Mistake where the file is damaged, and Unknown where its rule, its loss or a map of its net is
    neither in nobackprop nor imported.
    """
    path = Path(run_folder) if Path(run_folder).is_file() else Path(run_folder) / "best.pt"
    seeds = sorted(Path(run_folder).glob("seed*/best.pt"))
    if len(seeds) == 1:
        (path,) = seeds
    if not path.exists():
        hint = (
            "train it first, or check the path; a seed that diverged in its first epoch has none. Where there is a "
            "record.json all the same, delete it and run the command again"
        )
        if seeds:
            hint = f"choose one of its seeds: {', '.join(str(p.parent) for p in seeds)}"
        raise Missing(f"{run_folder} holds no trained net (best.pt): {hint}")
    redo = "delete it and the record.json beside it, and run the command again"
    try:
        content = sealed.read(path)
    except sealed.Damaged as e:
        raise Mistake(f"{e}: {redo}") from e
    try:
        net, weights, classes = Network.from_description(content["net"]), content["weights"], tuple(content["classes"])
        pixels = Pixels(content["pixels"]["mean"], content["pixels"]["std"], content["pixels"].get("floats", False))
        rule, loss = ((content[name]["class"], dict(content[name]["fields"])) for name in ("rule", "loss"))
    except Unknown as e:
        raise Unknown(f"{path} was trained with {e}") from e
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise Mistake(f"{path} holds no trained net that this version knows ({type(e).__name__}): {redo}") from e
    return Trained(
        net=net,
        rule=_made(Rule, *rule, path),
        weights=weights,
        loss=_made(Loss, *loss, path),
        pixels=pixels,
        classes=classes,
    )
