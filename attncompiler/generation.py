"""Generation: a prompt, and tokens chosen one after another from what the model says of the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attncompiler.emit import CompiledModel
from attncompiler.errors import InputError, fail
from attncompiler.runtime.inputs import number, whole

WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
Prompts = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]

PIECE = 2**26
"""Logits of a prompt that are made at once: of a long one the tokens go in pieces, and their logits are not kept."""
BETWEEN_READS = 16
"""Steps on a GPU between two questions whether all sequences have ended, each of which waits for it."""


@torch.no_grad()
def generate(
    model: CompiledModel,
    input_ids: Prompts,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
    on_tokens: Callable[[Tensor], None] | None = None,
    compiled: bool = False,
) -> Tensor:
    """Continue the prompts (B, P) by up to `max_new_tokens` tokens each: (B, P + N), as HF's `generate`.

    Without `do_sample` the likeliest token is taken, the first of equals. With it one is drawn by `generator` from
    softmax(logits / temperature), cut first to the `top_k` likeliest tokens and what equals the last of them, then to
    the nucleus of mass `top_p` (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751): the fewest likeliest tokens
    whose probabilities reach it, at least one.

    Prompts of unequal length come as a list, which is padded on the left, or as a batch padded on either side with
    `attention_mask` (B, P), non-zero for real tokens; each continues as if it were alone. New tokens follow the padded
    prompts. With rotary frequencies of type `dynamic`, which follow from a sequence's length, that is the whole length
    asked for, so `max_new_tokens` has a part in every token. A sequence that has given one of `eos_token_id` goes on
    with `pad_token_id` (the first end token if none is given; in a list without either 0), and all stop when the last
    has ended. `on_tokens` is called with every step's tokens (B,). The model runs in evaluation mode, and is left in
    the mode it was in. With `compiled` the steps after the prompts go through torch.compile: half a minute at first,
    and then less time for each token.

    Raises InputError: E401 shapes, E402 ids that are not whole numbers, E403 arguments, E404 devices, E503 a model that
    cannot be run step by step.
    """
    ends = _end_tokens(eos_token_id)
    pads = () if pad_token_id is None else (whole("pad_token_id", pad_token_id, 0),)
    vocabulary, device = _checked(model, (*ends, *pads))
    choose = _choice(do_sample, temperature, top_k, top_p, generator, device)
    pad = next(iter((*pads, *ends)), 0)
    prompts = _prompts(input_ids, attention_mask, pad, vocabulary, device)
    count = whole("max_new_tokens", max_new_tokens, 1)
    stops = torch.tensor(ends, dtype=torch.int64, device=device)
    tokens = prompts.tokens
    (B, P), every = tokens.shape, _interval(device, on_tokens is not None)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    made: list[Tensor] = []
    step = model.compiled_step if compiled else model.step
    with _evaluating(model):
        lengths = None if prompts.mask is None else prompts.mask.sum(1) + (count - 1)
        state = model.init_state(B, P + count - 1, lengths=lengths)
        logits, state = _read(model, prompts, state, max(1, PIECE // (B * vocabulary)))
        while True:
            chosen = choose(logits)
            if ends:
                chosen = torch.where(ended, pad, chosen)
                ended = ended | torch.isin(chosen, stops)
            made.append(chosen)
            if on_tokens is not None:
                on_tokens(chosen)
            if len(made) == count or (ends and len(made) % every == 0 and bool(ended.all())):
                break
            logits, state = step(chosen[:, None], state)
            logits = logits[:, -1]
    new = torch.stack(made, 1)
    if ends and every > 1:
        new = new[:, : _needed(new, stops)]
    return torch.cat([tokens, new], 1)


# --- arguments --------------------------------------------------------------------------------------------------------


def _checked(model: Any, tokens: Sequence[int]) -> tuple[int, torch.device]:
    """The vocabulary's size and the device of a model that can generate, for which `tokens` are tokens."""
    if not isinstance(model, CompiledModel):
        raise fail(InputError, "E403", f"generate takes a model that attncompiler built, not {type(model).__name__}")
    if model.spec is None or model.spec.model.vocab_size is None:
        raise fail(InputError, "E403", "generate needs a model of tokens, and this one takes embeddings")
    if model.spec.model.head.kind != "lm":
        message = f"generate needs a language model, and this one's head is {model.spec.model.head.kind!r}"
        raise fail(InputError, "E403", message, remedy="give it the head 'lm'")
    vocabulary = model.spec.model.vocab_size
    for token in tokens:
        _in_vocabulary(token, token, vocabulary)
    device = model.device
    if device.type == "meta":
        raise fail(InputError, "E403", "a model on meta has no weights to generate with", remedy="load it on a device")
    return vocabulary, device


def _in_vocabulary(least: int, most: int, vocabulary: int) -> None:
    if not 0 <= least <= most < vocabulary:
        outside = least if least < 0 else most
        raise fail(InputError, "E403", f"token {outside} is not one of the model's, 0 to {vocabulary - 1}")


def _end_tokens(given: int | Sequence[int] | None) -> tuple[int, ...]:
    try:
        listed = () if given is None else (given,) if isinstance(given, int) else tuple(given)
    except TypeError:
        raise fail(InputError, "E403", f"eos_token_id must be a token id or a list of them, not {given!r}") from None
    return tuple(whole("eos_token_id", token, 0) for token in listed)


@dataclass(frozen=True, slots=True)
class _Prompts:
    tokens: Tensor
    """(B, P) int64"""
    mask: Tensor | None
    """(B, P) bool; None where there is no padding"""


def _prompts(given: Prompts, mask: Tensor | None, pad: int, vocabulary: int, device: torch.device) -> _Prompts:
    if not isinstance(given, Tensor):
        if mask is not None:
            raise fail(InputError, "E403", "a list of prompts has no padding, so it takes no attention_mask")
        given, mask = _left_padded(_as_tensors(given, device), pad)
    if given.dim() != 2 or 0 in given.shape:
        raise fail(InputError, "E401", f"input_ids must be (B, P), of at least one token, not {tuple(given.shape)}")
    if given.dtype not in WHOLE:
        raise fail(InputError, "E402", f"input_ids must be whole numbers, not {given.dtype}")
    if mask is not None and not isinstance(mask, Tensor):
        raise fail(InputError, "E403", f"attention_mask must be a tensor, not {type(mask).__name__}")
    if mask is not None and mask.shape != given.shape:
        message = f"attention_mask must be {tuple(given.shape)} as the tokens are, not {tuple(mask.shape)}"
        raise fail(InputError, "E401", message)
    for name, tensor in (("input_ids", given), ("attention_mask", mask)):
        if tensor is not None and tensor.device != device:
            raise fail(InputError, "E404", f"the model is on {device}, and {name} on {tensor.device}")
    least, most = (int(each) for each in given.aminmax())
    _in_vocabulary(least, most, vocabulary)
    mask = None if mask is None else mask != 0
    if mask is not None and bool(mask.all()):
        mask = None
    if mask is not None and not bool(mask.any(1).all()):
        raise fail(InputError, "E403", "a prompt must have at least one token that is not padding")
    return _Prompts(given.long(), mask)


def _as_tensors(given: Sequence[Any], device: torch.device) -> list[Tensor]:
    try:
        return [torch.as_tensor(prompt, device=device) for prompt in given]
    except (TypeError, ValueError, RuntimeError) as error:
        raise fail(InputError, "E403", f"a prompt in a list must be token ids: {error}") from None


def _left_padded(prompts: list[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    if not prompts or any(prompt.dim() != 1 or not len(prompt) for prompt in prompts):
        shapes = ", ".join(str(tuple(prompt.shape)) for prompt in prompts)
        raise fail(
            InputError, "E401", f"prompts in a list must be (P,), of at least one token each, not {shapes or '()'}"
        )
    longest = max(len(prompt) for prompt in prompts)

    def padded(values: list[Tensor], fill: int) -> Tensor:
        return torch.stack([torch.nn.functional.pad(each, (longest - len(each), 0), value=fill) for each in values])

    return padded(prompts, pad), padded([torch.ones_like(prompt, dtype=torch.bool) for prompt in prompts], False)


@contextmanager
def _evaluating(model: CompiledModel) -> Iterator[None]:
    """The model in evaluation mode; afterwards each of its modules is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# --- one step ---------------------------------------------------------------------------------------------------------


def _read(model: CompiledModel, prompts: _Prompts, state: dict[str, Any], size: int) -> tuple[Tensor, dict[str, Any]]:
    """The logits (B, vocabulary) that follow each prompt's last real token, and the state after the prompts.

    The prompts go through the model `size` tokens at a time.
    """
    tokens, mask = prompts.tokens, prompts.mask
    B, P = tokens.shape
    logits: Tensor | None = None
    last = None if mask is None else torch.where(mask, torch.arange(P, device=tokens.device), 0).amax(1)
    for start in range(0, P, size):
        piece = tokens[:, start : start + size]
        made, state = model.step(piece, state, None if mask is None else mask[:, start : start + size])
        if last is None:
            logits = made[:, -1]
            continue
        place = (last - start).clamp(0, made.shape[1] - 1)
        found = made[torch.arange(B, device=made.device), place]
        logits = found if logits is None else torch.where((last >= start)[:, None], found, logits)
    assert logits is not None
    return logits, state


Choice = Callable[[Tensor], Tensor]
"""Logits (B, vocabulary) → tokens (B,)."""


def _choice(
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
    device: torch.device,
) -> Choice:
    if not isinstance(do_sample, bool):
        raise fail(InputError, "E403", f"do_sample must be True or False, not {do_sample!r}")
    if not do_sample:
        given = {"top_k": top_k is not None, "top_p": top_p is not None, "generator": generator is not None}
        given["temperature"] = not (isinstance(temperature, (int, float)) and temperature == 1.0)
        for name in (name for name, is_given in given.items() if is_given):
            raise fail(InputError, "E403", f"{name} needs do_sample=True: without it the likeliest token is taken")
        return lambda logits: logits.argmax(-1)
    heat = number("temperature", temperature, above=0)
    most = None if top_k is None else whole("top_k", top_k, 1)
    mass = None if top_p is None else number("top_p", top_p, above=0)
    if mass is not None and mass > 1:
        raise fail(InputError, "E403", f"top_p must be at most 1, not {top_p}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise fail(InputError, "E403", f"generator must be a torch.Generator, not {generator!r}")
    if generator is not None and generator.device.type != device.type:
        raise fail(InputError, "E404", f"the model is on {device}, and generator on {generator.device}")

    def choose(logits: Tensor) -> Tensor:
        probabilities = distribution(logits, heat, most, mass)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    return choose


def distribution(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """The probabilities (B, vocabulary), in fp32 or better, from which a token is drawn; see `generate`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    # from the largest, which stays 0: divided by next to nothing, logits of both signs would be infinite
    tiny = torch.finfo(logits.dtype).tiny
    logits = (logits - logits.amax(-1, keepdim=True)) / min(max(temperature, tiny), 1 / tiny)
    if top_p is not None and top_p < 1:
        ordered, index = logits.sort(descending=False)
        # from the least likely: what may go without leaving less than top_p, but never the last
        gone = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        gone[:, -1] = False
        logits = logits.masked_fill(gone.scatter(1, index, gone), -torch.inf)
    return logits.softmax(-1)


def _interval(device: torch.device, watched: bool) -> int:
    """Steps between two questions whether all have ended: on a CPU they cost nothing, and who watches waits anyway."""
    return 1 if device.type == "cpu" or watched else BETWEEN_READS


def _needed(new: Tensor, stops: Tensor) -> int:
    """How many steps it took until each sequence had ended."""
    ends = torch.isin(new, stops)
    first = torch.where(ends.any(1), ends.int().argmax(1) + 1, new.shape[1])
    return int(first.max())
