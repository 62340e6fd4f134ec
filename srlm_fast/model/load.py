"""Load a causal LM and its tokenizer from a HuggingFace folder or hub id: quietly, and safely."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import list_repo_files, snapshot_download
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from srlm_fast.errors import UserError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_OTHER_WEIGHTS = ["*.h5", "*.ot", "*.msgpack", "*.pth", "*.pt", "*.gguf", "*.onnx*", "original/*"]
_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_CAUSAL_CLASSES = ("ForCausalLM", "LMHeadModel")
_ADAPTERS = "adapter_config.json"
_NO_LIMIT = 1 << 30


def resolve_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the current GPU if there is one, else the CPU.

    Raises UserError when the name is unknown or the device is not there.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]?))?", name):
        raise UserError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:<index>")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {name} is not here ({torch.cuda.device_count()} GPUs are visible); use auto"
        )
    return device


def load_model(
    path: str, *, device: torch.device, dtype: str | torch.dtype = "auto"
) -> PreTrainedModel:
    """The causal LM of `path` on `device`, in eval mode.

    `dtype` "auto" is the checkpoint's own on a GPU and float32 on the CPU. Remote code is never
    run. Raises UserError when `path` is no model folder or hub id, its model is no causal LM, or
    its weights are damaged, incomplete or another configuration's.
    """
    _check_path(path)
    if dtype == "auto" and device.type == "cpu":
        dtype = torch.float32
    if isinstance(dtype, str) and dtype != "auto":
        dtype = _dtype(dtype)
    with quiet_transformers():
        config = _causal_config(path)
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported, and refused below in plainer words
                **_attention(config),
            )
        except Exception as error:  # safetensors, torch and transformers have kinds of their own
            raise UserError(
                f"cannot load the weights of {path}: {_first(error)}; copy the model again"
            ) from error
    model, report = loaded
    if report["mismatched_keys"]:
        raise UserError(
            f"the weights and the config.json of {path} do not belong together:"
            f" {min(report['mismatched_keys'])[0]} has another shape; copy both from one model"
        )
    if report["missing_keys"]:
        raise UserError(
            f"the weights of {path} are incomplete: {min(report['missing_keys'])} is missing"
        )
    moved: PreTrainedModel = model.to(device).eval()
    return moved


def load_tokenizer(path: str) -> Any:
    """The tokenizer of `path`; one without a pad token pads with its EOS.

    Raises UserError when the folder has no tokenizer, or a damaged one.
    """
    _check_path(path)
    folder = Path(path)
    if folder.is_dir() and not has_tokenizer(folder):
        raise UserError(
            f"model folder {path} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)});"
            " copy the tokenizer files of the model into it"
        )
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # tokenizers raises a bare Exception
            raise UserError(
                f"cannot load the tokenizer of {path}: {_first(error)}; check its tokenizer files"
            ) from error
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve_folder(path: str, *, weights: bool = True) -> Path:
    """The local folder of a model: `path` itself, or the hub's snapshot of it, with its `weights`
    or without.

    Raises UserError when it is neither, or the hub cannot be reached.
    """
    _check_path(path)
    if Path(path).is_dir():
        return Path(path)
    unwanted = _unused_files(path) if weights else ["*.safetensors", "*.bin", *_OTHER_WEIGHTS]
    try:
        return Path(snapshot_download(path, ignore_patterns=unwanted))
    except Exception as error:  # a dozen kinds: offline, unknown, gated, disk
        raise UserError(f"cannot get model {path} from the hub: {_first(error)}") from error


def has_weights(folder: Path) -> bool:
    """Whether there are files of weights."""
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin"))


def has_tokenizer(folder: Path) -> bool:
    """Whether there are files of a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def check_folder(path: str, *, weights: bool = True) -> Any:
    """The configuration of the model of `path`, of whose weights only the headers are read: what
    can be found wrong before a run starts, without the time and memory that they take.

    Raises UserError when it is no causal LM, has no weight files (unless it may: `weights` False),
    or one is damaged or cut short.
    """
    folder = resolve_folder(path, weights=weights)
    with quiet_transformers():
        config = _causal_config(str(folder))
    if weights and not has_weights(folder):
        raise UserError(
            f"model folder {folder} has no weights (*.safetensors or *.bin); copy them into it"
        )
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except Exception as error:
            raise UserError(
                f"cannot read the weights {file}: {_first(error)}; copy the file again (a git clone"
                " needs git lfs pull)"
            ) from error
    return config


def _unused_files(path: str) -> list[str]:
    """Patterns of the hub's files that are not needed: weights of other formats."""
    with suppress(Exception):  # offline: what is cached will do
        if any(name.endswith(".safetensors") for name in list_repo_files(path)):
            return [*_OTHER_WEIGHTS, "*.bin"]
    return _OTHER_WEIGHTS


def eos_token_ids(model: Any, tokenizer: Any = None) -> tuple[int, ...]:
    """Every id that ends a response, ascending: of the generation config, the configuration and
    the tokenizer together (chat models often name their end-of-turn token in only one of them)."""
    found: set[int] = set()
    sources = (getattr(model, "generation_config", None), text_config(model), tokenizer)
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            found.update([ids] if isinstance(ids, int) else ids)
    return tuple(sorted(found))


def context_length(model: Any) -> int:
    """Most tokens (prompt and response together) that the model's positions allow."""
    return context_of(model.config)


def context_of(config: Any) -> int:
    """`context_length` of the model of a configuration."""
    config = config.get_text_config(decoder=True)
    for name in _CONTEXT_FIELDS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return _NO_LIMIT


def text_config(model: Any) -> Any:
    """The configuration of the language model, also inside a multimodal one."""
    return model.config.get_text_config(decoder=True)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' warnings and progress bars, and restores them."""
    hf_logging: Any = logging
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _causal_config(path: str) -> Any:
    if (Path(path) / _ADAPTERS).is_file():
        raise UserError(
            f"{path} holds LoRA adapters, not a model; merge them into their base"
            " (peft.AutoPeftModelForCausalLM, merge_and_unload) and give that folder"
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # wrong values raise kinds of huggingface_hub's own
        raise UserError(
            f"cannot read the configuration of {path}: {_first(error)}; check its config.json"
        ) from error
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    named = config.architectures or []
    saved = [str(name) for name in (named if isinstance(named, list) else [named])]
    # BERT has a causal class too, but BertForMaskedLM is none.
    if not known or (saved and not any(n == known or n.endswith(_CAUSAL_CLASSES) for n in saved)):
        raise UserError(
            f"{path} holds a {config.model_type!r} model ({', '.join(saved) or 'no architecture'}),"
            " which is not a causal language model; give one that AutoModelForCausalLM can load"
        )
    return config


def _attention(config: Any) -> dict[str, str]:
    """SDPA knows no softcap of scores: older transformers leave it out, and say nothing."""
    text = config.get_text_config(decoder=True)
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    return {"attn_implementation": "eager"} if capped else {}


def _check_path(path: str) -> None:
    folder = Path(path)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", _ADAPTERS)):
            raise UserError(f"{path} has no config.json; give a folder that save_pretrained wrote")
    elif folder.exists():
        raise UserError(f"{path} is a file; give the model's folder")
    elif not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path):
        raise UserError(f"model folder {path!r} does not exist")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"unknown dtype {name!r}; use auto, float32 or bfloat16")
    return dtype


def _first(error: Exception) -> str:
    """What an error says, on one line: its first line, and the next one if that announces it."""
    if isinstance(error, KeyError):
        return f"unknown or missing {error}"
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    text = f"{first} {more[0].strip()}" if more and first.endswith(":") else first
    return text.removesuffix(".")
