#!/bin/bash
# One GPU of Hugging Face Jobs:  hf buckets create my-runs; bash examples/cluster/hf_jobs.sh USER/my-runs
# ./config holds config.yaml. The disk of a job is gone when it ends, so the run is copied to a bucket every minute.
BUCKET=hf://buckets/${1:?the bucket, as USER/my-runs}/mine

hf jobs run --detach --flavor a10g-large --timeout 12h --attempts 50 \
    --secrets HF_TOKEN --env "BUCKET=$BUCKET" --volume ./config:/config \
    pytorch/pytorch:2.11.0-cuda12.8-cudnn9-runtime bash -c '
pip install --quiet gpt-kit-hf
hf buckets sync "$BUCKET" /runs/mine || exit 1    # what earlier attempts saved

# Names that begin with a dot are being written or deleted; the lock is that of this machine.
upload() { hf buckets sync /runs/mine "$BUCKET" --delete --exclude ".*" --exclude "*/.*" --exclude run.lock; }

gpt-kit train --config /config/config.yaml --output_dir /runs/mine --resume &
run=$!
trap "kill -TERM $run" TERM
while kill -0 $run 2> /dev/null; do
    sleep 60 &
    wait -n $run $!
    upload
done
wait $run
code=$?
upload
exit $code
'
