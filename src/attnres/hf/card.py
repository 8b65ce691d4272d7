"""The model card of a model: what it is or was made of, under which licence, and how to load it."""

import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

TAG = "attention-residuals"
_CONVERTED = """
# {name} with Attention Residuals

`{name}` whose residual sums are now attention over depth ([Attention Residuals](https://arxiv.org/abs/2603.15031)):
`{residual}`{options}. With queries at zero it computes what `{name}` does, to rounding; training takes it from there.
"""
_NATIVE = """
# {name}

A language model whose residual connection is attention over depth
([Attention Residuals](https://arxiv.org/abs/2603.15031)): `{residual}`{options}.
"""
_LOAD = """
```python
import attnres.hf

model = attnres.hf.load("this-folder")  # pip install 'attnres[hf]'
```

After `import attnres.hf` transformers' Auto classes load it too.
"""
_WITHOUT = """
## Without attnres

`modeling_attnres.py` has the code, for machines where attnres is not installed. It needs torch and transformers. Read
it before you run it; attnres itself never does.

```python
import transformers

model = transformers.{auto}.from_pretrained("this-folder", trust_remote_code=True)
```
"""
_BEFORE = "\n# The card of "


def write_card(model: Any, folder: Path, source: Path | None = None, with_code: bool = False) -> None:
    """Writes README.md into the folder of a saved model, unless there is one, and copies the licence of the original.

    source: the folder of the original; by default where the model was loaded from, if that is a folder. A model's own
    card goes along as it is; of another its metadata and, below ours, its text are kept.
    with_code: whether the folder has the model's code, which our cards then say how to use.
    """
    text_config = model.config.get_text_config()  # of the language model, if there is more
    target, name = folder / "README.md", str(getattr(model.config, "_name_or_path", "") or "")
    if source is None and name and Path(name).is_dir():
        source = Path(name)
    for licence in sorted(source.glob("LICENSE*")) if source else []:
        if licence.is_file() and not (folder / licence.name).exists():
            shutil.copyfile(licence, folder / licence.name)
    section = _WITHOUT.format(auto=_auto_class(model)) if with_code else ""
    before = _card_in(folder if target.exists() else source)
    if before is not None and TAG in (before.data.get("tags") or []):
        text = _with_section(before.text, section)
        if text != before.text or not target.exists():
            before.text = text
            before.save(target)
        return
    if target.exists():
        return
    original = getattr(text_config, "original", None)
    name = (source.resolve().name if source else name) or (original.model_type if original else "AttnRes")
    facts = before.data.to_dict() if before else {}
    facts |= {"tags": [*(facts.get("tags") or []), TAG], "library_name": "transformers"}
    if source is None and name == getattr(model.config, "_name_or_path", ""):
        facts["base_model"] = name  # of the Hub; a folder's name would mean another model there
    options = "".join(f", {key}={value!r}" for key, value in text_config.residual_options.items())
    text = (_CONVERTED if original else _NATIVE).format(name=name, residual=text_config.residual, options=options)
    text += _LOAD + section
    if before is not None and before.text.strip():
        text += f"{_BEFORE}{name}\n\n{before.text.strip()}\n"
    ModelCard(f"---\n{ModelCardData(**facts).to_yaml()}\n---\n{text}", ignore_metadata_errors=True).save(target)


def _auto_class(model: Any) -> str:
    suffix = re.search(r"For\w+$|$", type(model).__name__)
    assert suffix is not None
    return f"AutoModel{suffix[0] or ('ForCausalLM' if hasattr(model, 'lm_head') else '')}"


def _with_section(text: str, section: str) -> str:
    """A card of ours with that section about the code, or without any."""
    text = re.sub(r"\n## Without attnres\n.*?(?=\n# |\Z)", "", text, flags=re.DOTALL)
    own, border, rest = text.partition(_BEFORE)
    return own + section + border + rest


def _card_in(folder: Path | None) -> ModelCard | None:
    if folder is None or not (folder / "README.md").is_file():
        return None
    try:
        return ModelCard.load(folder / "README.md", ignore_metadata_errors=True)
    except Exception:  # whatever YAML makes of it, a card that cannot be read is no reason to refuse a model
        return None
