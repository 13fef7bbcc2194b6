#!/bin/bash
# One GPU of Hugging Face Jobs:  hf buckets create my-runs; bash examples/cluster/hf_jobs.sh USER/my-runs
# ./config holds config.yaml. The disk of a job is gone when it ends; the bucket has a copy of each checkpoint.
bucket=hf://buckets/${1:?the bucket, as USER/my-runs}/mine

hf jobs run --detach --flavor a10g-large --timeout 12h --attempts 50 --secrets HF_TOKEN --volume ./config:/config \
    pytorch/pytorch:2.11.0-cuda12.8-cudnn9-runtime bash -c "
pip install --quiet gpt-kit-hf
exec gpt-kit train --config /config/config.yaml --output_dir /runs/mine --remote_dir $bucket --resume
"
