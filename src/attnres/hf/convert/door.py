"""Turning a transformers model into an Attention Residuals model that computes the same function, and loading such
models.

At zero pseudo-queries a read is the equal-weight mean of its sources, and the sources of any layer add up to the
standard residual stream; read at the scale of the sum, the converted model is therefore the same function at once,
and training moves it from there.
"""

import copy
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ... import json_text
from ...errors import Failure, UsageError, first_line
from ...files import is_gguf
from ..gguf_file import forget_quantisation, place_of
from ..kimi_k3 import door as kimi_k3
from . import classes, table, whole
from .classes import (
    base_of,
    build_residual,
    converted_config_class,
    converted_model_class,
    is_converted,
    original_class,
    register_models,
    upgrade,
)
from .part import places_in_outer_configs
from .proof import Proof
from .table import TYPE_PREFIX
from .whole import has_fixed_part, rebuild_whole, whole_config_class, whole_model_class


def convert(
    model: Any,
    residual: str = "block_attnres",
    num_blocks: int | None = None,
    *,
    block_size: int | None = None,
    verify: bool | None = None,
    **options: Any,
) -> Any:
    """Replaces the residual sums of a transformers model by Attention Residuals, in place; the function stays the same.

    Args:
        model: a PreTrainedModel whose residual stream is a plain sum, with or without a head; also the language model
            inside one for images and text, whose config then says so. Of a model with a head give the whole.
        residual: "block_attnres" or "full_attnres".
        num_blocks, block_size: for block_attnres, one of the two; the default is 8 blocks, or fewer in a shallow
            model. Sizes count layers, where each decoder layer has two, its attention and its MLP.
        verify: run the model on a few tokens before and after, and compare outputs and the gradients at its
            embeddings. By default what is not in `attnres.hf.convert.table`, whose entries tests prove: types that take
            the entry of another one, and those that you registered.
        options: others of the mechanism, such as eps.

    Returns the model, its class now the converted one (`AttnResLlamaForCausalLM` for a `LlamaForCausalLM`), with a
    config of its own. Parameters keep their names; new are `residual.pseudo_query` (zeros) and `residual.key_norm`
    (ones) of the base model, both [layers + 1, hidden size], in the dtype and on the device of the embedding.

    Raises UsageError with the reason for anything that is not such a model, is quantised, spread over devices or
    converted already, for sizes that do not fit, and if the model would compute something else; it is then as it was.
    """
    _check_model(model)
    base = base_of(model)
    entries = table.find(base)
    places = places_in_outer_configs(model)
    sizes = {"num_blocks": num_blocks, "block_size": block_size}
    options.update({name: size for name, size in sizes.items() if size is not None})
    mechanism = build_residual(base, entries, residual, options)
    if hasattr(mechanism, "num_blocks") and block_size is None:
        options["num_blocks"] = mechanism.num_blocks
    proof = Proof(model) if verify or (verify is None and not table.is_proven(base)) else None
    _give_own_config(model, residual, options)
    upgrade(model)
    embedding = model.get_input_embeddings().weight
    base.residual.to(device=embedding.device, dtype=embedding.dtype).train(model.training)
    if proof is not None:
        proof.hold(model)
    for place in places:
        setattr(place.config, place.name, model.config)
        rebuild_whole(place)
    return model


def load(folder: str | Path, **options: Any) -> Any:
    """Loads an Attention Residuals model from a folder (or a Hub name): a converted one, or a native
    `AttnResForCausalLM`.

    Args:
        folder: what `save_pretrained` of such a model wrote; or a checkpoint in Kimi K3's layout on disk, which is
            loaded as a native model.
        options: of transformers' `from_pretrained`, such as dtype, device_map or attn_implementation.

    Raises UsageError if the folder holds no such model or its weights do not fit its config; Failure if a file is
    damaged.
    """
    if options.pop("trust_remote_code", False):
        raise UsageError("trust_remote_code is not needed and not accepted: no code is run from a model's folder")
    if (config := kimi_k3.read_config(folder)) is not None:
        return kimi_k3.load(folder, config, **options)
    return load_weights(_class_in(folder), folder, **options)


def load_weights(model_class: Any, folder: str | Path, dropped: bool = False, **options: Any) -> Any:
    """`model_class.from_pretrained` from safetensors alone, in which no parameter may stay without its weight.

    Raises UsageError if weights do not fit the config (weights that the model has no place for only unless
    `dropped`), Failure if a file is damaged.
    """
    # sizes that do not match are reported below, with their names
    options |= {"output_loading_info": True, "use_safetensors": True, "ignore_mismatched_sizes": True}
    options["trust_remote_code"] = False  # and nobody is asked
    place, more = place_of(folder)
    try:
        model, report = model_class.from_pretrained(place, **options, **more)
    except SafetensorError as error:
        raise Failure(f"a weight file in {folder} is damaged ({first_line(error)}); fetch it again") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{folder} cannot be loaded: {first_line(error)}") from error
    for kind in ("missing", "mismatched", *(() if dropped else ("unexpected",))):
        if found := sorted(key if isinstance(key, str) else key[0] for key in report[f"{kind}_keys"]):
            others = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise UsageError(f"the weights in {folder} do not fit its config.json: {kind} {found[0]}{others}")
    if is_gguf(folder):
        forget_quantisation(model)
    return model


def load_pretrained(folder: str | Path, **options: Any) -> Any:
    """Loads any causal language model of transformers from a folder, a GGUF file or Hub name; raises what `load` does.

    A GGUF file's weights are dequantised. What has Attention Residuals in Kimi K3's layout is loaded with them.
    """
    if kind_of(read_config(folder)) == "native":
        return load(folder, **options)
    return load_weights(AutoModelForCausalLM, folder, dropped=True, **options)


def kind_of(config: Any) -> Literal["native", "converted", "pretrained"]:
    """What holds a transformers config: a model of ours, a converted one, or one without Attention Residuals."""
    if config.model_type == "attnres":
        return "native"
    return "converted" if config.model_type.startswith(TYPE_PREFIX) else "pretrained"


def read_config(folder: str | Path) -> Any:
    """The transformers config in a model folder. Raises UsageError if there is none that can be read."""
    if (native := kimi_k3.read_config(folder)) is not None:
        return native
    place, more = place_of(folder)
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise UsageError(f"{folder} is no model: it has no config.json; give the folder of a transformers model")
    _register_stored(Path(folder))
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=False, **more)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{folder} is no model: it has no config that can be read: {first_line(error)}") from error
    table.check_config(config)
    return config


def register_architectures() -> None:
    """Makes AutoConfig, and through it the AutoModel classes, know the converted form of every entry of the table, and
    of the models around some of them."""
    for module, model_types in ((classes, table.ARCHITECTURES), (whole, whole.WHOLES)):
        for model_type in model_types:
            classes.announce(model_type, module)


def _register_stored(folder: Path) -> None:
    """Makes AutoConfig know the converted type that a folder names, whatever it is."""
    try:
        named = json_text.parse_object((folder / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError):  # whoever reads the config says what is wrong with it
        return
    original = named.removeprefix(TYPE_PREFIX) if isinstance(named, str) else ""
    if original != named and original in CONFIG_MAPPING:
        config_class = CONFIG_MAPPING[original]
        (whole_config_class if has_fixed_part(config_class) else converted_config_class)(config_class)


def _class_in(folder: str | Path) -> Any:
    config = read_config(folder)
    if (kind := kind_of(config)) == "native":
        return AutoModelForCausalLM
    if kind == "pretrained":
        raise UsageError(f"{folder} holds a {config.model_type!r} model without Attention Residuals; convert it first")
    name = (config.architectures or [""])[0]
    original = original_class(name, type(config))
    if original is None:
        raise UsageError(f"{folder} names the model class {name!r}, which is not a converted class of transformers")
    return (whole_model_class if has_fixed_part(type(config).original) else converted_model_class)(original)


def _check_model(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        hint = "; merge the adapter into it first" if hasattr(model, "peft_config") else ""
        raise UsageError(f"model must be a transformers PreTrainedModel; it is a {type(model).__name__}{hint}")
    if not isinstance(model.config, type(model).config_class or PreTrainedConfig):
        raise UsageError(
            f"the {type(model).__name__} has a {type(model.config).__name__}, with which no folder of it could be "
            f"loaded again; make it of a {type(model).config_class.__name__}"  # type: ignore[union-attr]
        )
    if is_converted(model) or model.config.model_type == "attnres":
        raise UsageError(f"{type(model).__name__} has Attention Residuals already")
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise UsageError("the model carries adapters; convert it first and add them afterwards")
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise UsageError("the model is spread over several devices; convert it on one, then load it with a device_map")
    if getattr(model.config, "quantization_config", None) is not None or getattr(model, "is_quantized", False):
        raise UsageError("the model is quantised; convert the original in full precision, then quantise the result")
    for name, module in base_of(model).named_modules():
        if _is_quantised(module):
            raise UsageError(
                f"module {name} ({type(module).__name__}) is quantised and cannot carry training on; "
                f"convert the original in full precision, then quantise the result"
            )


def _is_quantised(module: nn.Module) -> bool:
    parameters = list(module.parameters(recurse=False))
    integers = any(not p.is_floating_point() for p in parameters)
    packed = any(type(p).__module__.startswith("torchao.") for p in parameters)  # which say that they are floats
    return integers or packed or "quantized" in type(module).__module__


def _give_own_config(model: Any, residual: str, options: dict[str, Any]) -> None:
    """Gives the model and all its modules one converted copy of their config; other models may share the old one."""
    old: Any = model.config
    new: Any = copy.deepcopy(old)
    new.__class__ = converted_config_class(old.__class__)
    register_models(new.__class__)
    new.residual, new.residual_options = residual, options
    new.architectures = None
    for module in model.modules():
        for name, value in vars(module).items():
            if value is old:
                vars(module)[name] = new


register_architectures()
