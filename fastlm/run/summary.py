"""The end of a run as a person reads it: a few lines from summary.json."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fastlm.run.progress import duration
from fastlm.terminal import wrap

_LABEL = 14  # columns of the first column


def summary_table(summary: dict, model: Path, width: int | None = None) -> str:
    """The end of a run; see `columns`."""
    return columns(_entries(summary, model), width)


def columns(entries: Iterable[tuple[str, str]], width: int | None = None) -> str:
    """Lines of a label and what it says, of at most `width` columns but for a long path; None: lines stay whole."""
    lines = []
    for label, text in entries:
        wrapped = wrap(text, None if width is None else max(20, width - _LABEL)).split("\n")
        lines += [f"{name:<{_LABEL}}{part}" for name, part in zip([label] + [""] * len(wrapped), wrapped)]
    return "\n".join(lines)


def _entries(summary: dict, model: Path):
    get = summary.get
    first, final, entropy = get("first_loss"), get("final_loss"), get("unigram_entropy")
    loss = "none: no step predicted a token" if first is None else f"{first:.3f}"
    if first != final:
        loss += f" -> {final:.3f}"
    if entropy is not None:
        loss += f" (unigram entropy {entropy:.3f})"
    yield "loss", loss
    if (held := get("val_loss")) is not None:
        known = {"val_loss", "val_perplexity", "val_bits_per_byte"}
        held = f"{held:.3f}, perplexity {_grouped(summary['val_perplexity'])}"
        if (bits := get("val_bits_per_byte")) is not None:
            held += f", {bits:.3f} bits a byte"
        more = (name for name in summary if name.startswith("val_") and name not in known)
        yield "held-out loss", ", ".join([held, *(f"{n[4:].replace('_', ' ')} {summary[n]:.3f}" for n in more)])
    yield "tokens", f"{summary['tokens']:,} in {summary['steps']:,} steps"
    low = " (the peak was measured on a busy machine: `fastlm info` measures again)" if (get("mfu") or 0.0) > 1 else ""
    yield "speed", f"{summary['tokens_per_s']:,.0f} tokens/s, MFU {percent(get('mfu'))}{low}"
    other = get("other_seconds") or 0.0
    more = f", and {duration(other)} for evaluations and checkpoints" if other >= 1 else ""
    yield "time", f"{duration(summary['seconds'])}{more}"
    told = [f"{summary[name]} {what}" for name, what in _TOLD.items() if get(name)]
    if told:
        yield "beware of", ", ".join(told)
    yield "model", str(model)


_TOLD = {
    "skipped_steps": "steps skipped, without finite gradients",
    "loss_spikes": "steps with a loss spike",
    "dropped_predictions": "selected tokens not predicted",
}


def percent(mfu: float | None) -> str:
    """61%, 0.6%, n/a."""
    if mfu is None:
        return "n/a"
    return f"{mfu:.0%}" if mfu >= 0.1 else f"{mfu:.1%}"


def _grouped(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
