#!/bin/sh
# What is a search worth: repeats docs/evidence/search. Two runs side by side, one thread each; an hour and a half on two
# cores.
#   sh docs/evidence/search.sh PUBLISHED CIFAR10 OUTPUT
# PUBLISHED are the authors' scales of B1: a file, or repopt_vgg_b1.published. CIFAR10 is an image folder. A second call
# continues what was interrupted.
set -eu
published=$1 data=$2 output=$3
here=$(dirname "$0")
OMP_NUM_THREADS=1 python "$here/search.py" "$published" "$data" "$output/searches"
arms='published formula search fast faster layer_wise long'
scales=$(for arm in published formula; do echo "$arm=$output/searches/$arm.safetensors"; done
    for arm in search fast faster layer_wise long; do echo "$arm=$output/searches/$arm/scales.safetensors"; done)
repopt-timm trial repopt_vgg -c cifar10_trial --amp --amp-dtype bfloat16 --data "$data" --train-images 20000 \
    --model-kwargs 'depths=(4,6,16,1)' 'widths=(16,32,64,128,512)' --epochs 8 --warmup-epochs 2 --val-interval 4 \
    --tuning-epochs 4 --seeds 3 --jobs 2 --threads 1 --scales $scales \
    --arms init repopt $arms --reference repopt --output "$output/search"
