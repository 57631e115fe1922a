#!/bin/sh
# MobileOne-S0 at equal epochs and at equal wall time: repeats docs/evidence/mobileone_s0 and docs/evidence/mobileone.
# Two runs side by side, one thread each; two hours on two cores.
#   sh docs/evidence/mobileone.sh CIFAR10 OUTPUT
# CIFAR10 is an image folder. A second call continues what was interrupted.
set -eu
data=$1 output=$2
trial() {
    name=$1 epochs=$2 seeds=$3
    shift 3
    repopt-timm trial repopt_mobileone_s0 -c cifar10_trial --channels-last --data "$data" --train-images 20000 \
        --epochs "$epochs" --warmup-epochs $((epochs / 8)) --val-interval 4 --model-kwargs 'strides=(1,2,2,2,2)' \
        --lr 0.1 --seeds "$seeds" --jobs 2 --threads 1 --output "$output/$name" "$@"
}
trial mobileone_s0 8 3 --arms branches sgd dirac init repopt identity --reference branches
# 3.6 times the epochs: an epoch with branches takes that much longer.
trial mobileone_s0-long 29 2 --arms sgd init repopt --reference repopt
repopt-timm trial --report "$output/mobileone_s0" "$output/mobileone_s0-long" --reference repopt \
    --output "$output/mobileone"
