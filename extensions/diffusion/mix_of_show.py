"""Mix-of-Show (2305.18292) on a diffusers pipeline: the statistics to fuse concepts by, and prompts for regions."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave import Adapter, CompositionError, PackageMissing, WeightingError
from loraweave.extend import brought

PIPELINES = {f"StableDiffusion{kind}{way}Pipeline" for kind in ("", "XL") for way in ("", "Img2Img", "Inpaint")}
# (top, left, bottom, right) as shares of the image's height and width, from 0 to 1
Box = tuple[float, float, float, float]


def inputs_of(pipe: Any, adapter: Adapter, run: Callable[[], object]) -> Any:
    """Return {layer: X^T X / n} of the inputs of the adapter's layers while `run()` runs the pipeline under it alone.

    `lw.merge(adapters, method="least_squares", statistics=[inputs_of(..), ..])` is then Mix-of-Show's gradient fusion in
    closed form: one update that acts on each concept's inputs like that concept's own adapter. n is the number of inputs, in
    all rows of a call, also guidance's without prompts. Raises LayerMismatch for convolutions, CompositionError for a layer
    that does not run, what Composer raises for an adapter that does not fit, and PackageMissing without the extension
    `statistics`, which records the inputs and merges by them.
    """
    modules = brought("collecting")
    if not modules:
        raise PackageMissing("no extension that is installed collects statistics; loraweave comes with one, `statistics`")
    return import_module(min(modules.values())).record_inputs(pipe, adapter, run)


class _Region(NamedTuple):
    """A region (box or mask), and the embeddings of its negative prompt and its prompt, (1, tokens, features) each."""

    where: Box | Tensor
    negative: Tensor
    positive: Tensor


@contextmanager
def regions(pipe: Any, given: Sequence[tuple[str, Box | Tensor]], *, negative_prompt: str | None = None) -> Iterator[None]:
    """Make each region of an image attend to a prompt of its own inside the block, and the rest to the pipeline's prompt.

    A region is (prompt, box) or (prompt, mask). A box is (top, left, bottom, right), shares of height and width between 0
    and 1, cut inwards to whole features; a mask of 0 and 1, (height, width), is read at the nearest place. In each
    cross-attention of the UNet, with h_k the output for the text of region k,

        h = mean of h_k over the regions that have the place,    h = that of the pipeline's prompt where there are none

    which is Mix-of-Show's regionally controllable sampling (pipeline_regionally_t2iadapter.py, without T2I-Adapter). Enter
    it within `engine.activate(...)`, since prompts of regions are read on entering. All images of a batch share them.

    Raises CompositionError for a pipeline other than Stable Diffusion 1, 2 and XL, or for one whose regions are set already;
    WeightingError for a box outside the image or empty, and for a mask of another form.
    """
    if type(pipe).__name__ not in PIPELINES:
        raise CompositionError(
            f"regions are for {', '.join(sorted(PIPELINES))}, whose UNet looks at text in attentions of its own, not for a "
            f"{type(pipe).__name__}"
        )
    unet = pipe.unet
    for _, where in given:
        _check(where)
    attentions = [module for name, module in unet.named_modules() if name.endswith("attn2") and hasattr(module, "processor")]
    if any(isinstance(attention.processor, _Regional) for attention in attentions):
        raise CompositionError("the pipeline has regions already: leave them first, and give all regions at once")
    # guidance leads away from the negative prompt, or ""
    encoded = {"device": pipe._execution_device, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    marked = []
    with torch.no_grad():
        for prompt, where in given:
            positive, negative = pipe.encode_prompt(prompt=prompt, negative_prompt=negative_prompt, **encoded)[:2]
            marked.append(_Region(where, negative, positive))
    size: list[int] = []

    def saw(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        size[:] = sample.shape[-2:]

    processors = [attention.processor for attention in attentions]
    handle = unet.register_forward_pre_hook(saw, with_kwargs=True)
    try:
        for attention in attentions:
            attention.processor = _Regional(attention.processor, pipe, marked, size)
        yield
    finally:
        handle.remove()
        for attention, processor in zip(attentions, processors, strict=True):
            attention.processor = processor


class _Regional:
    """An attention processor that runs the original processor on the pipeline's text and on each region's."""

    def __init__(self, own: Any, pipe: Any, found: Sequence[_Region], size: list[int]) -> None:
        self._own, self._pipe, self._found, self._size = own, pipe, found, size

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        plain: Tensor = self._own(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        guided = self._pipe.do_classifier_free_guidance
        num_rows, num_places = hidden_states.shape[:2]
        mask_KT = self._masks(num_places).to(plain.device)
        total_BTC = torch.zeros_like(plain)
        for mask_T, region in zip(mask_KT, self._found, strict=True):
            sides = [region.negative, region.positive] if guided else [region.positive]
            text = torch.cat([side.expand(num_rows // len(sides), -1, -1) for side in sides]).to(plain)
            total_BTC += mask_T[:, None] * self._own(attn, hidden_states, text, None, temb)
        # the output projection is the same affine map at each position, so that it may come before the mean
        count_T1 = mask_KT.sum(dim=0)[:, None]
        return torch.where(count_T1 == 0, plain, total_BTC / count_T1.clamp(min=1)).to(plain.dtype)

    def _masks(self, num_places: int) -> Tensor:
        """Return (regions, positions): 1 where a region has a position of the feature map, else 0."""
        height, width = self._size
        # each level of a UNet halves both, rounded up
        while height * width > num_places:
            height, width = math.ceil(height / 2), math.ceil(width / 2)
        masks = torch.zeros(len(self._found), height, width)
        for mask_HW, region in zip(masks, self._found, strict=True):
            if isinstance(region.where, Tensor):
                mask_11HW = region.where[None, None].float()
                mask_HW[:] = functional.interpolate(mask_11HW, (height, width), mode="nearest-exact")[0, 0]
            else:
                top, left, bottom, right = region.where
                rows = slice(math.ceil(top * height), math.floor(bottom * height))
                mask_HW[rows, math.ceil(left * width) : math.floor(right * width)] = 1
        return masks.flatten(1)


def _check(where: Any) -> None:
    if isinstance(where, Tensor):
        if where.ndim != 2 or not bool(((where == 0) | (where == 1)).all()) or not bool(where.any()):
            raise WeightingError(
                f"a mask is (height, width) of 0 and 1 with a 1 in it, not {tuple(where.shape)} of other values"
            )
        return
    try:
        top, left, bottom, right = where
        holds = 0 <= top < bottom <= 1 and 0 <= left < right <= 1
    except (TypeError, ValueError):
        holds = False
    if not holds:
        raise WeightingError(
            f"a box is (top, left, bottom, right), shares of the image that span an area, not {where!r:.80}"
        )
