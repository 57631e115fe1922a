#!/bin/sh
# Fine-tuning a RepVGG-A0 on 5,000 images, with its branches or merged: repeats docs/evidence/finetune. Two runs side by
# side, one thread each; an hour on two cores.
#   sh docs/evidence/finetune.sh PRETRAINED CIFAR10 TINY OUTPUT
# PRETRAINED is the RepVGG-A0 as a name for timm.create_model, such as local-dir:pretrained/baselines/repvgg_a0. CIFAR10,
# which it was trained on, and TINY are image folders. A second call continues what was interrupted.
set -eu
pretrained=$1 data=$2 new=$3 output=$4
tune() {
    name=$1 epochs=$2
    shift 2
    python "$(dirname "$0")/finetune.py" "$pretrained" "$data" "$output/merged" \
        repopt_vgg_a0 -c cifar10_trial --data "$new" --train-images 5000 --epochs "$epochs" --warmup-epochs 1 \
        --val-interval "$epochs" --weight-decay 4e-5 --tuning-epochs 6 --lrs 0.05 0.1 0.2 --seeds 3 --jobs 2 \
        --threads 1 --output "$output/$name" "$@"
}
tune finetune 6 --arms branches sgd repopt --reference branches
# At equal time by steps: one with branches takes 1.36 times as long. Learning rates are the ones of the shorter runs.
mkdir -p "$output/finetune-long"
[ -d "$output/finetune-long/tuning" ] || cp -r "$output/finetune/tuning" "$output/finetune-long/"
tune finetune-long 8 --arms sgd repopt --reference repopt
repopt-timm trial --report "$output/finetune" "$output/finetune-long" --reference repopt \
    --output "$output/finetune-report"
