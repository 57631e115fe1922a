#!/bin/sh
# Fine-tuning a RepVGG-A0 on 5,000 images, with its branches or merged: repeats docs/evidence/finetune. The RepVGG is
# trained first, on all images of CIFAR10. Two runs side by side, one thread each; two hours on two cores.
#   sh docs/evidence/finetune.sh CIFAR10 TINY OUTPUT
# CIFAR10 and TINY are image folders. A second call continues what was interrupted.
set -eu
data=$1 new=$2 output=$3
pretrained=$output/repvgg_a0
# The card is written last.
if [ ! -f "$pretrained/README.md" ]; then
    repopt-timm train "$data" -c cifar10_trial --model repvgg_a0 --opt sgd --lr 0.1 --epochs 15 --warmup-epochs 2 \
        --val-interval 5 --output "$output" --experiment repvgg_a0-run --resume
    repopt-timm save "$output/repvgg_a0-run/last.pth.tar" "$pretrained"
fi
tune() {
    name=$1 epochs=$2
    shift 2
    python "$(dirname "$0")/finetune.py" "local-dir:$pretrained" "$data" "$output/merged" \
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
