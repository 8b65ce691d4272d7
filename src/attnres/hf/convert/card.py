"""The model card of a model that was made of another: what it is, under which licence, and how to load it."""

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

TAG = "attention-residuals"
_TEXT = """
# {name} with Attention Residuals

`{name}` whose residual sums are now attention over depth ([Attention Residuals](https://arxiv.org/abs/2603.15031)):
`{residual}`{options}. With queries at zero it computes what `{name}` does, to rounding; training takes it from there.

```python
import attnres.hf

model = attnres.hf.load("this-folder")  # pip install 'attnres[hf]'
```

After `import attnres.hf` transformers' Auto classes load it too.
"""
_NATIVE = """
# {name} as a native AttnRes model

`{name}`, which has [Attention Residuals](https://arxiv.org/abs/2603.15031) of its own, `{residual}`{options}, under the
names of the package `attnres`. The weights are the original's.

```python
import attnres.hf

model = attnres.hf.load("this-folder")  # pip install 'attnres[hf]'
```

After `import attnres.hf` transformers' Auto classes load it too.
"""


def write_card(model: Any, folder: Path, source: Path | None = None) -> None:
    """Writes README.md into the folder of a saved model, unless there is one, and copies the licence of the original.

    source: the folder of the original; by default where the model was loaded from, if that is a folder. A converted
    model's own card goes along as it is; of another its metadata and, below ours, its text are kept.
    """
    text_config = model.config.get_text_config()  # of the language model, if there is more
    target, name = folder / "README.md", str(getattr(model.config, "_name_or_path", "") or "")
    if source is None and name and Path(name).is_dir():
        source = Path(name)
    for licence in sorted(source.glob("LICENSE*")) if source else []:
        if licence.is_file() and not (folder / licence.name).exists():
            shutil.copyfile(licence, folder / licence.name)
    if target.exists():
        return
    before = _card_in(source)
    if before is not None and TAG in (before.data.get("tags") or []):
        before.save(target)
        return
    name = (source.resolve().name if source else name) or text_config.original.model_type
    facts = before.data.to_dict() if before else {}
    facts |= {"tags": [*(facts.get("tags") or []), TAG], "library_name": "transformers"}
    if source is None and name == getattr(model.config, "_name_or_path", ""):
        facts["base_model"] = name  # of the Hub; a folder's name would mean another model there
    options = "".join(f", {key}={value!r}" for key, value in text_config.residual_options.items())
    form = _NATIVE if text_config.model_type == "attnres" else _TEXT
    text = form.format(name=name, residual=text_config.residual, options=options)
    if before is not None and before.text.strip():
        text += f"\n# The card of {name}\n\n{before.text.strip()}\n"
    ModelCard(f"---\n{ModelCardData(**facts).to_yaml()}\n---\n{text}", ignore_metadata_errors=True).save(target)


def _card_in(folder: Path | None) -> ModelCard | None:
    if folder is None or not (folder / "README.md").is_file():
        return None
    try:
        return ModelCard.load(folder / "README.md", ignore_metadata_errors=True)
    except Exception:  # whatever YAML makes of it, a card that cannot be read is no reason to refuse a model
        return None
