"""Training runs: pretraining on text and finetuning on instruction rows.

`pretrain`, `finetune` and `lora` say what is trained; `loop` and `steps` are the loop over batches; `trainer` is one
update in mixed precision; `saving`, `run_log`, `console` and `summary` record a run; `verify` and `replay` check one.
"""
