"""The models of tinycompress in lm-evaluation-harness: `--model tinycompress --model_args pretrained=MODEL`.

It lives with the commands because it is one: the entry point `lm_eval.models` by which the harness finds it, and
`python -m tinycompress.cli.harness` for releases of the harness that look for none (0.4.13 and earlier).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from ..checkpoints.tokenizer import Tokenizer
from ..errors import InputError
from ..evaluation.completions import completions
from ..evaluation.likelihood import PairEncoder, log_likelihoods
from ..model.sampling import LIMITS, NEUTRAL, Sampling
from ..model.transformer import Transformer
from .arguments import need_tokenizer, open_model, runnable

TOGETHER = 8  # prompts that are continued at one time


@register_model("tinycompress")
class HarnessModel(TemplateLM):
    """A model for lm-evaluation-harness: a checkpoint in torch and float32, an exported folder in its runtime. Its
    scores are those of the harness's class for transformers models.

    Args:
        pretrained: a MODEL as the commands take it (a folder, an export, a GGUF file, a hub name), or a model in torch
            or in its runtime, with its `tokenizer`.
        tokenizer: of a model that is given as such.
        batch_size: prompts that are continued at one time; "auto" is 8. Log-likelihoods are batched by length, whatever
            it says.
        max_batch_size: not used; the harness passes it.
        device: where a checkpoint runs; where there is no CUDA, "cuda" is the CPU.
        max_length: tokens that the model reads at once; None is its context.
    """

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Tokenizer | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        self.name = str(pretrained) if isinstance(pretrained, str) else type(pretrained).__name__
        self.engine = pretrained
        if isinstance(pretrained, str):
            graph = open_model(pretrained)
            tokenizer = need_tokenizer(graph)
            self.engine = runnable(pretrained, graph)
        if tokenizer is None:
            raise InputError("tokenizer", "none", "the tokenizer of the model")
        on_gpu = device is not None and (not device.startswith("cuda") or torch.cuda.is_available())
        if on_gpu and isinstance(self.engine, Transformer):
            self.engine.to(device)
        self._device = self.engine.device if isinstance(self.engine, Transformer) else torch.device("cpu")
        self.encoder = PairEncoder(tokenizer, self.engine.config)
        self.max_length = int(max_length or self.engine.config.max_position)
        self.together = TOGETHER if batch_size is None or str(batch_size).startswith("auto") else int(batch_size)
        if _takes_one_row(self.engine):
            self.together = 1

    @property
    def eot_token_id(self) -> int | None:
        return self.encoder.end

    @property
    def prefix_token_id(self) -> int | None:
        return self.encoder.prefix

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results."""
        return {"model_num_parameters": self.engine.config.n_params, "model_source": self.name}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.encoder.encode(string, add_special_tokens)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **unused: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        scores = log_likelihoods(self.engine, pairs, self.max_length, progress=not disable_tqdm)
        answers = [(score.value, score.greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, answers):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts: windows of the model's context that share one token."""
        windows: list[Any] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm)):
            totals[number] += value
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A text behind every prompt, up to the first of its stop sequences."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        out = [""] * len(requests)
        for numbers in groups.values():
            prompts = [requests[number].args[0] for number in numbers]
            for number, text in zip(numbers, self._texts(prompts, requests[numbers[0]].args[1], disable_tqdm)):
                out[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return out

    def _texts(self, prompts: Sequence[str], given: Mapping[str, Any], disable_tqdm: bool) -> Iterator[str]:
        """What is written behind prompts that share their options."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), 256))
        tokenizer = self.encoder.tokenizer
        eos = None if self.encoder.end is None else tokenizer.decode([self.encoder.end])
        until = handle_stop_sequences(kwargs.pop("until"), eos=eos)
        count = kwargs.pop("max_gen_toks")
        if count >= self.max_length:
            raise InputError("max_gen_toks", count, f"less than the model's context, {self.max_length}")
        stops = [stop for stop in until if stop]

        def finished(new: list[int]) -> bool:
            text = tokenizer.decode(new, skip_special_tokens=True)
            return any(stop in text for stop in stops)

        room = self.max_length - count
        ids = [self.tok_encode(prompt)[-room:] for prompt in prompts]
        options = _sampling(kwargs)
        written = completions(self.engine, ids, count, options, finished, self.together, not disable_tqdm)
        for new in written:
            yield postprocess_generated_text(tokenizer.decode(new, skip_special_tokens=True), stops, None)


def _sampling(kwargs: dict[str, Any]) -> Sampling:
    """The harness's generation options as ours; one that would change the text and is not ours is an `InputError`."""
    samples = kwargs.pop("do_sample")
    options = {name: kwargs.pop(name) for name in LIMITS if name in kwargs}
    options["temperature"] = (options.get("temperature") or 1.0) if samples else 0.0
    unknown = [name for name, value in kwargs.items() if value is not None and value not in NEUTRAL.get(name, ())]
    if unknown:
        raise InputError("generation options", ", ".join(unknown), f"do_sample, {', '.join(LIMITS)}")
    return Sampling(**options)  # type: ignore[typeddict-item]


def _takes_one_row(engine: Any) -> bool:
    """Whether it is a static export, whose graphs have fixed shapes."""
    if isinstance(engine, Transformer):
        return False
    from tinycompress.export import StaticModel

    return isinstance(engine, StaticModel)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
