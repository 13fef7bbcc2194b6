"""Registration of the model with the Auto classes of transformers, without importing transformers before its use."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"
_AUTO_MODEL = "transformers.models.auto.modeling_auto"
# Auto class: this package's class for it, and transformers' table of class names.
_CLASSES = {
    "AutoModel": ("GPTKitModel", "MODEL_MAPPING_NAMES"),
    "AutoModelForCausalLM": ("GPTKitForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "AutoModelForSequenceClassification": (
        "GPTKitForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
    "AutoModelForTokenClassification": (
        "GPTKitForTokenClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    ),
    "AutoModelForQuestionAnswering": ("GPTKitForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"),
}


def register() -> None:
    """Register configuration and models with the Auto classes; a second call changes nothing."""
    _register_config()
    _register_models()


def register_when_used() -> None:
    """Register what transformers has loaded already, and the rest as soon as its Auto classes are imported."""
    if _AUTO_MODEL in sys.modules:
        register()
        return
    if _AUTO_CONFIG in sys.modules:
        _register_config()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Watches the imports of transformers and of this package, finds nothing itself, and goes when all is registered.

    The models need modules that may themselves be importing the Auto classes at that moment. So they are registered
    when the outermost import ends.
    """

    def __init__(self) -> None:
        self._running = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return what the other finders find, with a loader that reports the end of the import."""
        if fullname.partition(".")[0] not in ("transformers", "gpt_kit_hf"):
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(fullname, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next((each for each in found if each is not None), None)
        if spec is not None and spec.loader is not None:
            self._report(spec.loader)
        return spec

    def _report(self, loader: Any) -> None:
        load = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            self._running.depth = getattr(self._running, "depth", 0) + 1
            try:
                load(module)
            finally:
                self._running.depth -= 1
            if self._running.depth == 0:
                self._register()

        loader.exec_module = exec_module

    def _register(self) -> None:
        if self not in sys.meta_path:
            return
        if _AUTO_MODEL in sys.modules:
            sys.meta_path.remove(self)
            register()
        elif _AUTO_CONFIG in sys.modules:
            self._running.depth += 1  # the imports of the configuration do not register it again
            try:
                _register_config()
            finally:
                self._running.depth -= 1


def _register_config() -> None:
    from transformers import AutoConfig

    from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig

    AutoConfig.register(GPTKitConfig.model_type, GPTKitConfig, exist_ok=True)
    # Saved folders carry the code, so that they load where this package is not installed.
    GPTKitConfig.register_for_auto_class("AutoConfig")


def _register_models() -> None:
    import transformers
    from transformers.models.auto import modeling_auto

    from gpt_kit_hf.model import modeling_gpt_kit
    from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig

    # Registration does not add to the static tables. Trainer's label smoothing and the pipelines look class names up
    # there, and the common model tests use them to find the classes without a loss.
    for auto_class, (name, table) in _CLASSES.items():
        auto, model = getattr(transformers, auto_class), getattr(modeling_gpt_kit, name)
        auto.register(GPTKitConfig, model, exist_ok=True)
        model.register_for_auto_class(auto_class)
        getattr(modeling_auto, table)[GPTKitConfig.model_type] = name


def add_to_transformers_namespace() -> None:
    """Make the classes attributes of `transformers`, for servers that run in this process.

    vLLM and `transformers serve` look the architecture of a config.json up as an attribute of the library. Nothing in
    this package needs it, so it is not done at import.
    """
    import transformers

    from gpt_kit_hf.model import modeling_gpt_kit
    from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig

    # transformers replaces its own module object while it is imported, so other modules may hold another object than
    # this one. All of these objects share their class.
    owner = transformers if type(transformers) is ModuleType else type(transformers)
    for cls in (GPTKitConfig, *(getattr(modeling_gpt_kit, name) for name, _ in _CLASSES.values())):
        setattr(owner, cls.__name__, cls)
