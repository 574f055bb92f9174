"""A folder or hub repository with a peft adapter as a model: its base, the adapter merged into the
weights, so that an edit is of what really runs and is saved with it.
"""

from __future__ import annotations

import json
from typing import Any

from knowedit.errors import ModelError


def base_of(source: str, **where: Any) -> str | None:
    """The name of the model that the adapter at `source` belongs to; None where there is no
    adapter.

    Args:
        where: revision and the like, as transformers takes them; the files are at hand.

    Raises:
        ModelError: the adapter does not say which model it belongs to.
    """
    from transformers.utils import find_adapter_config_file

    revision = where.get("revision")
    path = find_adapter_config_file(source, revision=revision, local_files_only=True)
    if path is None:
        return None
    with open(path, encoding="utf-8") as stream:
        base = json.load(stream).get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"{source} is a peft adapter that does not name its base model; merge it yourself "
            "(merge_and_unload), save the result, and give that folder"
        )
    return str(base)


def merge(hf: Any, source: str, **where: Any) -> Any:
    """The transformers model `hf` with the adapter at `source` merged into its weights.

    Raises:
        ModelError: an adapter of its kind cannot be merged.
    """
    from peft import PeftModel

    revision = where.get("revision")
    adapted = PeftModel.from_pretrained(hf, source, revision=revision)
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = adapted.active_peft_config.peft_type.value
        raise ModelError(
            f"{source} is a {kind} adapter, which cannot be merged into weights; edit its base "
            "model instead"
        )
    merged = adapted.merge_and_unload()
    # the weights are the base's no longer, and no one else has them
    merged.name_or_path = merged.config._name_or_path = source
    return merged
