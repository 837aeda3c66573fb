"""Prompts through a pipeline's text encoders, each distinct text once. Knows no seeds and no stages."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from overtone.progressive.engine.call import PipelineCall, Text
from overtone.progressive.engine.cut_texts import watching
from overtone.progressive.pictures import Pictures
from overtone.progressive.settings import Sampling

logger = logging.getLogger(__name__)

_ENCODE_TOGETHER = 8  # prompts in one pass of the text encoders: bounds their memory, not the results


class TextEncoder:
    """The text encoders of one pipeline."""

    def __init__(self, call: PipelineCall) -> None:
        self._call = call
        self._warned: set[str] = set()

    def encode(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str | None],
        sampling: Sampling,
        known: MutableMapping[str, Text] | None = None,
    ) -> Encoded:
        """See `Engine.encode`."""
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one each")
        guided = self._call.guided(sampling)
        if guided == "never" and any(negatives):
            self._warn_once("negative prompts have no effect: these settings run no negative prompt")
        # As the pipelines do: one of their own where guidance is always on, else only one that is given.
        runs = [guided == "always" or (guided == "given" and n is not None) for n in negatives]
        own = self._call.family.negative_text
        wanted = [own if n is None else n for n, run in zip(negatives, runs, strict=True) if run]
        known = {} if known is None else known
        positive = self._texts(prompts, sampling, known)
        # As the pipelines do, not in one batch with the prompts: that may change an embedding's last bits.
        negative = iter(self._texts(wanted, sampling, known))
        return Encoded(tuple(positive), tuple(next(negative) if run else None for run in runs))

    def _texts(
        self, texts: Sequence[str], sampling: Sampling, known: MutableMapping[str, Text]
    ) -> list[Text]:
        """Each distinct text once, and none of those that are `known`."""
        if self._call.family.text is None:
            return [{"prompt": text} for text in texts]
        here = {text: known[text] for text in dict.fromkeys(texts) if text in known}
        new = [text for text in dict.fromkeys(texts) if text not in here]
        if new:
            added = dict(zip(new, self._through_encoders(new, sampling), strict=True))
            here |= added
            known.update(added)
        return [here[text] for text in texts]

    def _through_encoders(self, texts: list[str], sampling: Sampling) -> list[Text]:
        names = self._call.family.text
        assert names is not None
        arguments = self._arguments(sampling)
        counted = {"batch_size"} & inspect.signature(self._call.pipe.encode_prompt).parameters.keys()
        rows: list[Text] = []
        with self._call.aside("encode") as pipe:
            together = 1 if self._call.family.alone else _ENCODE_TOGETHER
            for start in range(0, len(texts), together):
                chunk = texts[start : start + together]
                with watching(pipe) as seen:
                    # A list of its own: some pipelines write their chat template into it.
                    given = {"prompt": list(chunk)} | {name: len(chunk) for name in counted}
                    values = pipe.encode_prompt(**(arguments | given))
                values = values if isinstance(values, tuple) else (values,)
                named = {n: v for n, v in zip(names, values, strict=False) if n and v is not None}
                rows += [
                    EncodedText(self._row(named, i), truncated)
                    for i, truncated in enumerate(seen.cut(len(chunk)))
                ]
        return rows

    def _arguments(self, sampling: Sampling) -> dict[str, Any]:
        """The arguments of `encode_prompt`, prompts left out, as the pipeline's own call gives them."""
        defaults, call = self._call.defaults, self._call.arguments(sampling)
        parameters = inspect.signature(self._call.pipe.encode_prompt).parameters
        arguments: dict[str, Any] = {
            name: call.get(name, defaults[name])  # the call's default, not encode_prompt's own
            for name in parameters
            if name in defaults and "prompt" not in name
        }
        arguments |= {name: None for name, p in parameters.items() if p.default is p.empty}
        arguments |= {"device": self._call.device}
        if "do_classifier_free_guidance" in parameters:
            arguments["do_classifier_free_guidance"] = False  # negatives are encoded like any other text
        if "lora_scale" in parameters:
            arguments["lora_scale"] = (call.get("joint_attention_kwargs") or {}).get("scale")
        return arguments

    def _row(self, named: Mapping[str, Any], index: int) -> Text:
        row = {name: value[index] for name, value in named.items()}
        if self._call.family.ragged == "pad":
            mask = row.pop("prompt_embeds_mask", None)
            if mask is not None:
                row["prompt_embeds"] = row["prompt_embeds"][: int(mask.sum())]  # [tokens, D]
        return row

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("%s: %s", self._call.family.name, message)


class EncodedText(dict[str, Any]):
    """One prompt as the pipeline's call takes it (`Text`), which remembers whether it was cut."""

    def __init__(self, values: Mapping[str, Any], truncated: bool | None) -> None:
        super().__init__(values)
        self.truncated = truncated
        """Whether every text encoder cut it; None: not known."""


@dataclass(frozen=True)
class Encoded:
    """Encoded prompts, one a row, with the pictures that rows start from, which are encoded when their size
    is known (engine/starts.py). Rows with the same text share tensors."""

    positive: tuple[Text, ...]
    negative: tuple[Text | None, ...]
    """None for a row that runs no negative prompt."""
    pictures: tuple[Pictures | None, ...] = ()
    """None for a row that starts from noise; none given: all do."""

    def __post_init__(self) -> None:
        if len(self.positive) != len(self.negative):
            raise ValueError(f"{len(self.positive)} prompts but {len(self.negative)} negative ones")
        if not self.pictures:
            object.__setattr__(self, "pictures", (None,) * len(self.positive))
        if len(self.pictures) != len(self.positive):
            raise ValueError(f"{len(self.positive)} prompts but {len(self.pictures)} pictures")

    def __len__(self) -> int:
        return len(self.positive)

    @property
    def truncated(self) -> tuple[bool | None, ...]:
        """For each row whether every text encoder cut its prompt; None: not known."""
        return tuple(text.truncated if isinstance(text, EncodedText) else None for text in self.positive)

    def __getitem__(self, rows: slice | Sequence[int]) -> Encoded:
        chosen = range(len(self))[rows] if isinstance(rows, slice) else rows
        return Encoded(
            tuple(self.positive[i] for i in chosen),
            tuple(self.negative[i] for i in chosen),
            tuple(self.pictures[i] for i in chosen),
        )

    @classmethod
    def cat(cls, parts: Sequence[Encoded]) -> Encoded:
        """The rows of all parts, in their order."""
        return cls(
            tuple(text for part in parts for text in part.positive),
            tuple(text for part in parts for text in part.negative),
            tuple(one for part in parts for one in part.pictures),
        )


def text_arguments(
    call: PipelineCall, encoded: Encoded, sampling: Sampling, *, unguided: bool = False
) -> dict[str, Any]:
    """Encoded rows as arguments of one call of the pipeline, negative ones where it is guided by them: by all
    rows' or by none's. `unguided`: by none's, whatever the rows have."""
    arguments, guided = call.collate(encoded.positive), call.guided(sampling)
    negative = [text for text in encoded.negative if text is not None]
    if guided == "never" or unguided:
        return arguments
    if len(negative) == len(encoded):
        return arguments | call.collate(negative, "negative_")
    if negative or guided == "always":
        raise ValueError("guidance needs negative prompts: encode with the same sampling settings")
    return (
        arguments | call.unguided()
    )  # else the pipeline warns at each call that its own default does nothing
