"""Would the hosted Gemma models take an adapter? Each documented rule of Workers AI, one line each.

The two files may come from anybody. They are read as JSON and as the header of a safetensors file, no number of which
is touched, and whatever is wrong with them is a finding and not an exception. What the documentation is silent about is
neither accepted nor refused: it is reported as unknown.

References
----------
https://developers.cloudflare.com/workers-ai/fine-tunes/loras/ as it stood in 2024, where it names the two Gemma models
(rule "page"), and the same guide later, under features/, where its list of models names others (rule "later").
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from refgemma.errors import InputError
from refgemma.lora.hosted_files import (
    CONFIG_FILE,
    HOSTED,
    WEIGHTS_FILE,
    factors_of,
    fits,
    read_adapter_header,
    read_json_object,
)
from refgemma.lora.hosted_rules import (
    Finding,
    Verdict,
    base_model,
    field_is,
    file_names,
    modules,
    options,
    other_tensors,
    pairs,
    rank,
    readable,
    shapes,
    size,
    unquantised,
)

# version of the guide -> largest rank, and the size in MB that a file must stay below
LIMITS = {"page": (8, 100), "later": (32, 300)}


@dataclass(frozen=True, kw_only=True)
class HostedReport:
    """What the hosted models would say to an adapter."""

    folder: Path  # the adapter
    rule: str  # which version of the guide was applied
    findings: tuple[Finding, ...]  # one a rule, in the order of checking
    models: tuple[str, ...]  # the hosted model that its shapes fit; empty where they fit neither

    @property
    def verdict(self) -> Verdict:
        """The worst of the findings: "refused", else "unknown", else "accepted"."""
        verdicts = {finding.verdict for finding in self.findings}
        return "refused" if "refused" in verdicts else "unknown" if "unknown" in verdicts else "accepted"

    @property
    def accepted(self) -> bool:
        """Whether every rule is kept, and nothing is used that the documentation is silent about."""
        return self.verdict == "accepted"


def check_hosted(folder: str | Path, rule: str = "page") -> HostedReport:
    """Say whether the hosted models would take an adapter, as far as that is documented.

    Parameters
    ----------
    folder : str or Path
        Holds ``adapter_config.json`` and ``adapter_model.safetensors``.
    rule : {"page", "later"}, default "page"
        Rank at most 8 and less than 100 MB, or rank at most 32 and less than 300 MB.

    Returns
    -------
    HostedReport
        Every rule with what was found. A missing or damaged file is a finding, too, and rules about its content are
        then left out.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    ValueError
        If `rule` is unknown.

    Notes
    -----
    Undocumented, and so no part of the verdict: whether the service checks these rules on upload or on use, and what it
    does with an adapter that breaks one. How many adapters an account has is not for a folder to tell.
    """
    if rule not in LIMITS:
        raise InputError(f"rule is {rule!r:.60}: expected {' or '.join(map(repr, LIMITS))}")
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: expected one that holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    largest_rank, megabytes = LIMITS[rule]
    config, config_error = read_json_object(folder / CONFIG_FILE)
    tensors, tensors_error = read_adapter_header(folder / WEIGHTS_FILE)
    factors = factors_of(tensors or {})
    models = tuple(model for model in HOSTED if fits(factors, model))

    findings = [file_names(folder), readable(CONFIG_FILE, config_error), readable(WEIGHTS_FILE, tensors_error)]
    findings += size(folder / WEIGHTS_FILE, megabytes)
    if config is not None:
        findings += [
            field_is(config, "peft_type", "LORA"),
            field_is(config, "task_type", "CAUSAL_LM"),
            field_is(config, "model_type", "gemma"),
            rank(config, factors, largest_rank),
            base_model(config, models),
            unquantised(config),
            *options(config),
        ]
    if tensors is not None:
        findings += [pairs(config or {}, factors), shapes(factors, models), *modules(factors), *other_tensors(tensors)]
    return HostedReport(folder=folder, rule=rule, findings=tuple(findings), models=models)
