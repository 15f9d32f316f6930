"""The losses from quantised weights: of an adapter trained on them but used on full ones, and of answers after fusing.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314) trains D on Q(W) + D, so that W + D differs from the trained layer by W -
Q(W), reported as |W - Q(W)| / |D|, in Frobenius norms. What `train_adapters` makes on a quantised base has that base's
`quantization_config` as `card["quantization"]`. Other adapters are known to be from such a base only if their card says so.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from loraweave import Adapter, CompositionError, PackageMissing
from loraweave.extend import TargetLayer, algebra
from loraweave.extend.live import Fused
from loraweave.extend.models import is_floating

# {a layer's module: {an adapter's hash and mark: warning}}, so that it is calculated once for a model
_TOLD: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()


def is_quantised(layer: TargetLayer) -> bool:
    """Return True for a linear layer whose weight is stored quantised, so that no update can be added in place."""
    if layer.kind.name != "linear" or layer.number is not None or layer.transposed or layer.offloaded:
        return False
    weight = layer.module._parameters.get("weight")
    if weight is None:
        # parametrized layers compute a plain weight on the way
        return not isinstance(getattr(layer.module, "weight", None), Tensor)
    return not weight.is_meta and (type(weight.data) is not Tensor or not is_floating(weight.dtype))


def full_weight_warnings(adapters: Mapping[str, Adapter], layers: Mapping[str, TargetLayer]) -> list[str]:
    """Return a warning for each adapter that was trained on quantised weights, if the model's layers have full ones.

    `adapters` are by name, `layers` the model's target layers by path.
    """
    sentences = []
    for name, adapter in adapters.items():
        mark = adapter.card.get("quantization")
        targets = [layers[layer] for layer in adapter.layers if layer in layers]
        if not isinstance(mark, Mapping) or not targets or any(map(is_quantised, targets)):
            continue
        told = _TOLD.setdefault(targets[0].module, {})
        key = f"{adapter.hash} {mark}"
        if key not in told:
            try:
                told[key] = _told(differences(adapter, mark, layers))
            except PackageMissing as error:
                told[key] = str(error)
            # a card may say anything
            except (ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
                told[key] = f"its card's quantization cannot be read ({type(error).__name__}: {error})"
        sentences.append(
            f"expert {name!r} was trained on weights quantised by {mark.get('quant_method')}, and is now written into full "
            f"ones: {told[key]}. It is exact on the base that it saw: load_base(..., quantization_config=...)"
        )
    return sentences


def differences(adapter: Adapter, mark: Mapping[str, Any], layers: Mapping[str, TargetLayer]) -> dict[str, float] | None:
    """Return {layer: |W - Q(W)| / |D|} over the linear layers that `mark`, a quantization_config as JSON, quantises.

    None for a quantisation that weights alone do not determine: GPTQ's and AWQ's look at data.
    """
    ratios: dict[str, float] = {}
    skipped = mark.get("llm_int8_skip_modules") or mark.get("modules_to_not_convert") or ["lm_head"]
    for name, factors in adapter.layers.items():
        layer = layers.get(name)
        if layer is None or not isinstance(layer.module, nn.Linear) or any(part in name for part in skipped):
            continue
        weight_OI = layer.dense_weight_OI().detach()
        rounded_OI = quantised(weight_OI, mark)
        if rounded_OI is None:
            return None
        size = algebra.norm(factors)
        if size:
            ratios[name] = float(torch.linalg.vector_norm(weight_OI.float() - rounded_OI.float())) / size
    return ratios


def quantised(weight_OI: Tensor, mark: Mapping[str, Any]) -> Tensor | None:
    """Return Q(W), dequantised, by the library that `mark` names, a transformers `quantization_config` as JSON.

    None for a library other than bitsandbytes and torchao. Raises PackageMissing if it is not installed.
    """
    method = mark.get("quant_method")
    try:
        if method == "bitsandbytes":
            return _by_bitsandbytes(weight_OI, mark)
        if method == "torchao":
            from torchao.quantization import quantize_
            from transformers import TorchAoConfig

            linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight_OI.clone(), requires_grad=False)
            quantize_(linear, TorchAoConfig.from_dict(dict(mark)).get_apply_tensor_subclass())
            return linear.weight.dequantize()
    except ImportError as error:
        raise PackageMissing(
            f"what {method} makes of a base is not known without it: pip install 'loraweave[quantised]'"
        ) from error
    return None


def _by_bitsandbytes(weight_OI: Tensor, mark: Mapping[str, Any]) -> Tensor:
    from bitsandbytes import functional
    from bitsandbytes import nn as layers

    if mark.get("load_in_8bit"):
        codes_OI, scales_O, _ = functional.int8_vectorwise_quant(weight_OI.half())
        return codes_OI.float() * scales_O[:, None] / 127  # type: ignore[no-any-return]
    nested, form = bool(mark.get("bnb_4bit_use_double_quant")), mark.get("bnb_4bit_quant_type", "fp4")
    made = layers.Params4bit(weight_OI.contiguous(), requires_grad=False, compress_statistics=nested, quant_type=form)
    made = made.to(weight_OI.device)
    return functional.dequantize_4bit(made.data, made.quant_state)  # type: ignore[no-any-return]


def _told(found: Mapping[str, float] | None) -> str:
    if not found:
        return "how far these are apart cannot be calculated from the weights alone"
    shares = sorted(found.values())
    return (
        f"these differ by {statistics.median(shares):.2g} times its own update in the median of {len(shares)} layers, by "
        f"{shares[0]:.2g} to {shares[-1]:.2g} in all"
    )


@dataclass(frozen=True)
class LogitsLoss:
    """The change of a model's predictions by fusing, over all tokens of some texts.

    `kl` is the mean of KL(exact || fused) in nats, `other_choice` the share of tokens with another likeliest successor, and
    `largest` the largest difference of two log-probabilities.
    """

    kl: float
    other_choice: float
    largest: float


@torch.inference_mode()
def logits_loss(written: Fused, tokenizer: Any, texts: Sequence[str]) -> LogitsLoss:
    """Return how far the logits of these texts, each read alone, are from those with all updates of quantised layers live.

    `written` is what `Composer.fused` gives its block. Raises CompositionError for texts without tokens, and after the
    block's end.
    """
    kl = other = count = largest = 0.0
    model = written.model
    device = next(model.parameters()).device
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt").to(device)
        with written.exact():
            exact = model(**inputs).logits.float().log_softmax(dim=-1)
        fused = model(**inputs).logits.float().log_softmax(dim=-1)
        kl += float((exact.exp() * (exact - fused)).sum())
        other += float((exact.argmax(dim=-1) != fused.argmax(dim=-1)).sum())
        count += exact.shape[:-1].numel()
        largest = max(largest, float((exact - fused).abs().max()))
    if not count:
        raise CompositionError("logits_loss() needs a text of at least one token")
    return LogitsLoss(kl / count, other / count, largest)
