"""Whether a model can be saved when a cell is merged, found out before the first update and not after the last."""

import tempfile
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefscan.common.errors import UserError


def refuse_unsavable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save configuration, generation configuration, tokenizer and the smallest weight to a temporary folder.

    Raises UserError where that fails, as for a generation configuration that contradicts itself. A 4-bit base is merged
    in full precision: of it, the weight is left out.
    """
    name, weight = min(model.state_dict().items(), key=lambda item: item[1].numel())
    quantized = bool(getattr(model, "is_quantized", False))
    with tempfile.TemporaryDirectory(prefix="prefscan-") as folder:
        try:
            if quantized:
                model.config.save_pretrained(folder)
                if model.can_generate() and model.generation_config is not None:
                    model.generation_config.save_pretrained(folder)
            else:
                given: Any = {name: weight}
                model.save_pretrained(folder, state_dict=given)
            tokenizer.save_pretrained(folder)
        except OSError:  # of the temporary folder
            raise
        except Exception as error:  # whatever a model's own code raises
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"model.source: a merged {type(model).__name__} could not be saved ({type(error).__name__}: {reason}); "
                "choose another revision or model, in which that is mended"
            ) from None
