"""Loads models and tokenizers of Hugging Face's `transformers` from local files.

Nothing is downloaded, no code that comes with a model is run, and weights are read only from safetensors files, which
cannot hold code.
"""

import copy
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from distrib.errors import ConfigError, did_you_mean
from distrib.extras import require
from distrib.run_folder.checkpoint import named_state

_LOCAL = {"local_files_only": True, "trust_remote_code": False}
_ROUNDING = 1e-3  # largest difference of logits by rounding; if documents attend to each other, it is 1e-2 or more


def require_installed() -> None:
    """Check that the extra is installed, and keep its libraries quiet. Raises ConfigError."""
    require("huggingface", "task.target: this task", "datasets", "tokenizers", "transformers")
    import datasets
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # otherwise tokenizers warns at each fork
    # Each rank would draw its own progress bar. Warnings are about errors that are checked here, or about library code.
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def find_config(model: Any) -> tuple[Any, Path | None]:
    """Return the model's config, and the folder with its weights, or None for random weights. Raises ConfigError.

    `model`: the local folder of a model; or, for random weights, a config as a mapping or as the path of a JSON file.
    """
    from transformers import AutoConfig

    if isinstance(model, dict):
        return _config_from_mapping(model), None
    path = _path(model, "task.model")
    if path.suffix == ".json" and path.is_file():
        with refused("task.model"):
            values = json.loads(path.read_text())
            _require_known(values)
            return AutoConfig.for_model(**values), None
    _require_folder(path, "task.model", "config.json")
    with refused("task.model"):
        _require_known(json.loads((path / "config.json").read_text()))
        config = AutoConfig.from_pretrained(path, **_LOCAL)
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"task.model: the weights in {path} are quantized, and cannot be trained; give the originals")
    if not any((path / f"model.safetensors{suffix}").exists() for suffix in ("", ".index.json")):
        if pickled := sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth")):
            raise ConfigError(
                f"task.model: {path} has its weights in {pickled[0]}, a pickle, which can run code; if you trust it, "
                "convert it: AutoModel….from_pretrained(…).save_pretrained(…) writes model.safetensors"
            )
        raise ConfigError(
            f"task.model: {path} has no model.safetensors; for random weights give {path / 'config.json'}"
        )
    return config, path


def _config_from_mapping(values: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    _require_known(values)
    with refused("task.model"):
        config = AutoConfig.for_model(**values)
        usual = type(config)()
    known = {*usual.to_dict(), *usual.attribute_map}
    for name in values:
        if name not in known:  # transformers would store it, and ignore it
            hint = did_you_mean(str(name), known)
            raise ConfigError(f"task.model.{name}: {values['model_type']} has no such key{hint}")
    return config


def _require_known(values: dict[str, Any]) -> None:
    """Raise ConfigError if transformers does not have the architecture, because code of a model is not run."""
    from transformers import CONFIG_MAPPING

    if "model_type" not in values:
        raise ConfigError("task.model: the config has no model_type; give the architecture, for example llama")
    kind = str(values["model_type"])
    if kind not in CONFIG_MAPPING:
        hint = did_you_mean(kind, CONFIG_MAPPING.keys(), ", and code that comes with a model is not run")
        raise ConfigError(f"task.model.model_type: transformers has no {kind!r}{hint}")


def find_tokenizer(tokenizer: Any, model_folder: Path | None) -> Any:
    """Load a tokenizer from a local folder, by default the model's. Raises ConfigError.

    `bytes` means ByT5's tokenizer without its extra ids, which needs no files.
    """
    from transformers import AutoTokenizer, ByT5Tokenizer

    if tokenizer == "bytes":
        return ByT5Tokenizer(extra_ids=0)
    if tokenizer is None and model_folder is None:
        raise ConfigError("task.tokenizer: missing, and task.model is a config; give a local folder, or bytes")
    path = model_folder if tokenizer is None else _path(tokenizer, "task.tokenizer")
    assert path is not None, "checked above"
    _require_folder(path, "task.tokenizer", "tokenizer_config.json")
    with refused("task.tokenizer"):
        return AutoTokenizer.from_pretrained(path, **_LOCAL)


def require_sizes(config: Any, tokenizer: Any, context_length: int) -> None:
    """Raise ConfigError if the model has too few tokens or positions. `config`: of the part with the vocabulary."""
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"task.tokenizer: it has {len(tokenizer)} tokens, the model has {config.vocab_size}; give the model's own "
            "tokenizer"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and context_length > longest:
        raise ConfigError(f"task.context_length: {context_length}; the model has {longest} positions, give no more")


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the SHA-256 of the files that the tokenizer is saved as."""
    digest = hashlib.sha256()
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


class SpecialTokens:
    """Adds a tokenizer's special tokens to a text's tokens, unless they are there, as from a chat template."""

    def __init__(self, tokenizer: Any) -> None:
        """Find the tokens with which the tokenizer begins a text, such as Llama's <s>. Raises ConfigError."""
        self._tokenizer = tokenizer
        whole, text = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
        starts = [start for start in range(len(whole) - len(text) + 1) if whole[start : start + len(text)] == text]
        if not starts:
            raise ConfigError("task.tokenizer: it changes a text's own tokens when it adds special ones; give another")
        self._first: list[int] = whole[: starts[0]]

    def begun(self, tokens: list[int]) -> list[int]:
        """Return a text's tokens, with the special tokens that begin a text."""
        return tokens if tokens[: len(self._first)] == self._first else [*self._first, *tokens]

    def ended(self, tokens: list[int]) -> list[int]:
        """Return a text's tokens, with the eos_token at the end. If one is followed by white space only, cut that
        off."""
        end, text = self._tokenizer.eos_token_id, tokens
        if end not in text:
            return [*tokens, end]
        while text and text[-1] != end and not self._tokenizer.decode(text[-1:]).strip():
            text = text[:-1]
        return text if text and text[-1] == end else [*tokens, end]


def build(auto_class: Any, config: Any, folder: Path | None, new_head: bool = False) -> nn.Module:
    """Return the model in fp32, with the weights in `folder`, or with random ones from torch's generator.

    On torch's meta device it has no weights. With `new_head`, weights of the head that the folder lacks are random.
    Raises ConfigError if the folder lacks others.
    """
    config = copy.deepcopy(config)
    with refused("task.model"):
        if folder is None or torch.get_default_device().type == "meta":
            model = auto_class.from_config(config, dtype=torch.float32)
        else:
            model, found = auto_class.from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **_LOCAL
            )
            body = f"{model.base_model_prefix}."
            missing = [name for name in sorted(found["missing_keys"]) if not new_head or name.startswith(body)]
            if missing:
                raise ConfigError(f"task.model: {folder} lacks {len(missing)} of the weights, first {missing[0]}")
    for part in (model.config, model.config.get_text_config()):
        part.use_cache = False  # the key-value cache is only for generation
    return model  # type: ignore[no-any-return]


def require_order(model: Any, packed: bool) -> None:
    """Raise ConfigError if a prediction depends on later tokens, or with `packed`, on another document in the window.

    This is tested with a forward, because an architecture's config does not tell how it treats positions that restart.
    """
    tokens = torch.arange(3, 11)[None]
    positions = {"position_ids": torch.arange(4).repeat(2)[None]}
    name = f"{type(model).__name__} of {model.config.model_type}"
    training = model.training
    model.eval()
    with torch.no_grad(), refused("task.model"):
        if _differ(model(tokens).logits[:, :-1], model(tokens[:, :-1]).logits):
            raise ConfigError(f"task.model: {name} attends to later tokens; if it has is_decoder, set it to true")
    if packed:
        with torch.no_grad(), refused("task.packing"):
            packed_logits = model(tokens, **positions).logits[:, 4:]
            if _differ(packed_logits, model(tokens[:, 4:], position_ids=positions["position_ids"][:, 4:]).logits):
                raise ConfigError(
                    f"task.packing: {name} lets documents in one window attend to each other; set packing: false, "
                    "which gives each document its own windows"
                )
    model.train(training)


def _differ(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() > _ROUNDING * one.std())


def export(
    auto_class: Any, config: Any, tokenizer: Any, source: Path | None, weights: dict[str, Tensor], folder: Path
) -> None:
    """Write a folder that `from_pretrained` reads, with transformers' file names. Raises ConfigError."""
    # transformers imports DeepSpeed here, which logs this line.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    with torch.device("meta"), refused("task.model"):
        model = auto_class.from_config(copy.deepcopy(config), dtype=torch.float32)
        if any(not torch.equal(weights[name], weights[first]) for name, first in named_state(model)[1].items()):
            config = copy.deepcopy(config)  # an adapter has changed one of two tied weights
            config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
            model = auto_class.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder, state_dict=weights)
    generation = "generation_config.json"
    if source is not None and (source / generation).exists():
        shutil.copyfile(source / generation, folder / generation)
    tokenizer.save_pretrained(folder)


@contextmanager
def refused(key: str) -> Iterator[None]:
    """Turn a library's error about the user's input into a ConfigError of one line that names the config's key."""
    from huggingface_hub.errors import StrictDataclassError

    usual = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError)
    try:
        yield
    except (*usual, SafetensorError, StrictDataclassError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{key}: {reason[:300]}") from None


def _path(given: Any, key: str) -> Path:
    if not isinstance(given, str) or not given:
        raise ConfigError(f"{key}: {given!r}; give the path of a local folder")
    return Path(given).expanduser()


def _require_folder(path: Path, key: str, file: str) -> None:
    if not path.is_dir():
        raise ConfigError(
            f"{key}: {str(path)!r} is not a local folder, and nothing is downloaded; fetch a model from the Hub first: "
            "hf download ORGANISATION/NAME --local-dir FOLDER"
        )
    if not (path / file).exists():
        raise ConfigError(f"{key}: {path} has no {file}; give a folder that save_pretrained wrote")
