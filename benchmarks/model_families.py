"""Make the table of docs/use/models.md: which passes are the model's own, for every family of transformers.

Usage: python benchmarks/model_families.py [--write] [--families NAME ...] [--seconds N]

Prints the table; with --write, puts it into docs/use/models.md. A family is tried with configurations of public models
in public_models.py, else with the defaults of its own class, always scaled down. What cannot be built is a row with
the reason. Takes about a minute of one core; --seconds bounds that, and what is left is listed as not tried.
"""

import argparse
import contextlib
import inspect
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from public_models import PUBLIC

PAGE = Path(__file__).resolve().parent.parent / "docs" / "use" / "models.md"
START, END = "<!-- table: python benchmarks/model_families.py --write -->\n", "<!-- end of the table -->"
HEAD = "| family | tried with | alone | shared | packed | note |\n|---|---|---|---|---|---|\n"
FAMILY_SECONDS = 300
DEFAULTS = "its class's defaults"
NOT_TEXT = ("git", "musicgen", "musicgen_melody", "whisper", "trocr", "moshi")
NOT_TEXT += ("gemma4_assistant", "gemma4_unified_assistant")
"""Listed as causal language models, but of sound or images, or drafts that read another model's states."""

RECURRENT = {"linear_attention", "conv", "recurrent", "mamba", "hybrid", "hybrid_sliding"}
"""Types of layers that carry something from token to token beside attention."""
KNOWN = {
    "doge": "its own forward changes with padding once rows are longer than its window",
    "gpt_neo": "windows are counted within the row, not by position",
    "openai-gpt": "takes a mask for padding alone",
    "prophetnet": "needs inputs of its own for the tokens ahead",
}
"""Causes that neither settings nor signatures show; read in transformers' code."""


@dataclass(frozen=True)
class Outcome:
    """What came of one configuration: yes or no for every pass, or why there is none."""

    family: str
    tried: str
    passes: tuple[str, str, str]
    note: str


class TooLong(Exception):
    """A family took longer than FAMILY_SECONDS."""


def families() -> list[str]:
    """Every family that transformers lists as a causal language model of text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(NOT_TEXT), key=str.lower)


def configurations(family: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Public models of a family and their settings, else the defaults of its class, as a decoder."""
    public = [(name, settings) for name, settings in PUBLIC.items() if settings["model_type"] == family]
    yield from public or [(DEFAULTS, {"model_type": family})]


def outcome(family: str, tried: str, settings: dict[str, Any]) -> Outcome:
    """Try one configuration. Any error of the family's own code is its note, never the end of the table."""
    from transformers import CONFIG_MAPPING

    from keel.learner import forward_contract
    from keel.learner.scaled_down_models import ScaleDownError

    try:
        config = CONFIG_MAPPING[family].from_dict(
            {key: value for key, value in settings.items() if key != "model_type"}
        )
        if getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder and tried == DEFAULTS:
            config.is_decoder, tried = True, f"{DEFAULTS}, as a decoder"
        with _limit(FAMILY_SECONDS):
            verdict = forward_contract.of_config(config)
            note = "" if verdict.alone and verdict.shared and verdict.packed else cause(config, verdict)
    except ScaleDownError as error:
        reason = str(error).partition(": ")[2].removeprefix("its scaled-down model cannot be built (").removesuffix(")")
        return Outcome(family, tried, ("-", "-", "-"), f"cannot be built: {_short(reason)}")
    except Exception as error:  # whatever a family's code raises is what the table is there to say
        return Outcome(family, tried, ("-", "-", "-"), f"does not run: {type(error).__name__}: {_short(str(error))}")
    passes = tuple("yes" if passed else "no" for passed in (verdict.alone, verdict.shared, verdict.packed))
    return Outcome(family, tried, passes, note)


def cause(config: Any, verdict: Any) -> str:
    """Why a family does not pass: what its layers or its code are known for, else what the comparison said."""
    from keel.learner import scaled_down_models

    small = scaled_down_models.scale_down(config)
    model, text = scaled_down_models.build(small), small.get_text_config()
    kinds = {str(kind) for name in ("layer_types", "layers_block_type") for kind in getattr(text, name, None) or ()}
    attention = getattr(text, "attn_config", None)
    if text.model_type in KNOWN:
        return KNOWN[text.model_type]
    if not verdict.alone and not _is_causal(model, text):
        return "not causal: tokens see those behind them"
    if kinds & RECURRENT or text.model_type in ("rwkv", "xlstm"):
        return "layers with a state or a convolution carry over from one sequence to the next"
    if text.model_type == "bloom" or getattr(text, "alibi", False) or getattr(attention, "alibi", False):
        return "ALiBi takes distances within the row, not positions"
    if "chunked_attention" in kinds:
        return "chunks of attention are counted from the row's first token"
    if any("compressed" in kind for kind in kinds):
        return "keys are compressed in blocks counted from the row's first token"
    if any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules()):
        return "positions follow from where padding tokens lie"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "takes no position ids"
    return _short("; ".join(sorted(set(verdict.reasons.values()))))


def _is_causal(model: Any, config: Any) -> bool:
    """Whether early tokens' logits stay when later tokens are others."""
    import torch

    from keel.learner import scaled_down_models

    ids = torch.arange(scaled_down_models.FIRST_ORDINARY_TOKEN, config.vocab_size)
    rows = torch.stack([ids[:60], torch.cat([ids[:30], ids[-30:]])])
    with torch.no_grad():
        logits = torch.cat([model(input_ids=row[None]).logits[:, :30] for row in rows])
    return torch.allclose(logits[0], logits[1], atol=1e-4)


@contextlib.contextmanager
def _limit(seconds: int) -> Iterator[None]:
    """Raise TooLong in this thread after `seconds`; another timer that runs is put back."""

    def stop(*_: int | FrameType | None) -> None:
        raise TooLong(f"took over {seconds} s")

    handler, timer = signal.signal(signal.SIGALRM, stop), signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def _short(text: str) -> str:
    """One line without what differs from machine to machine or would break a table."""
    line = re.sub(r"differ by up to [\d.e+-]+ nats", "differ", " ".join(text.split()))
    line = "; ".join(dict.fromkeys(line.split("; ")))
    return re.sub(r"[|<>]", " ", line)[:160]


def outcomes(wanted: list[str], seconds: float) -> list[Outcome]:
    """Try all configurations of these families, within `seconds`."""
    start, results = time.monotonic(), []
    for family in wanted:
        for tried, settings in configurations(family):
            if time.monotonic() - start > seconds:
                results.append(Outcome(family, tried, ("-", "-", "-"), f"not tried within {seconds:.0f} s"))
                continue
            results.append(outcome(family, tried, settings))
            print(f"{time.monotonic() - start:6.1f} s  {family}: {' '.join(results[-1].passes)}", file=sys.stderr)
    return results


def rows(results: list[Outcome]) -> list[str]:
    """Lines of the table: configurations of a family with the same outcome share one."""
    together: dict[tuple[str, tuple[str, str, str], str], list[str]] = {}
    for result in results:
        together.setdefault((result.family, result.passes, result.note), []).append(result.tried)
    return [
        f"| {family} | {', '.join(tried)} | {' | '.join(passes)} | {note} |"
        for (family, passes, note), tried in together.items()
    ]


def summary(results: list[Outcome]) -> str:
    """How many families take the fast passes, how many one row a sequence, how many are refused."""
    passes = {family: {result.passes for result in results if result.family == family} for family in families()}
    fast = [family for family, seen in passes.items() if seen == {("yes", "yes", "yes")}]
    refused = [family for family, seen in passes.items() if any(each[0] == "no" for each in seen)]
    unbuilt = [family for family, seen in passes.items() if seen and all(each[0] == "-" for each in seen)]
    slower = len([family for family, seen in passes.items() if seen]) - len(fast) - len(refused) - len(unbuilt)
    return (
        f"{len(fast)} families pass all three, {slower} read one row a sequence in at least one form of theirs,"
        f" {len(refused)} are refused in at least one, {len(unbuilt)} cannot be built small.\n\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/use/models.md")
    parser.add_argument("--families", nargs="*", help="only these")
    parser.add_argument("--seconds", type=float, default=600.0, help="stop trying after so long")
    options = parser.parse_args()
    results = outcomes(options.families or families(), options.seconds)
    table = summary(results) + HEAD + "\n".join(rows(results)) + "\n"
    if options.write:
        page = PAGE.read_text(encoding="utf8")
        before, after = page.split(START)[0], page.split(END)[1]
        PAGE.write_text(before + START + table + END + after, encoding="utf8")
    else:
        print(table, end="")


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported
    main()
