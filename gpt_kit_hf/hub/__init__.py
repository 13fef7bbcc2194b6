"""Model folders and the Hugging Face Hub: find, check, publish, verify and download a model.

- `model_folder`: find the folder of a run, a model or a Hub id, load from it, write one.
- `base_model`: the model that a training run starts from.
- `safety` (folders and checkpoints), `untrusted_files` (JSON and safetensors headers) and `template_sandbox` (chat
  templates) check a model of unknown origin before it is loaded: no pickle, no code.
- `push` publishes a model as one commit and pulls one; `manifest` selects and lists the published files; `secret_scan`
  refuses secrets and local paths; `client` downloads with checked digests and words the Hub's errors.
- `verify` is the post-push verification: it compares what fresh processes, which run `probe`, find in a commit.
- `card/`: the model card.
"""

import lazy_loader

# The public names, loaded when they are first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "push": ["PushResult", "pull_model", "push_to_hub"],
        "verify": ["VerificationReport", "verify_publication"],
    },
)
