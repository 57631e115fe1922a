#!/bin/sh
# What is a search worth: repeats docs/evidence/search. Two runs side by side, one thread each; two hours on two
# cores.
#   sh docs/evidence/search.sh PUBLISHED CIFAR10 OUTPUT
# PUBLISHED are the authors' scales of B1: a file, or repopt_vgg_b1.published. CIFAR10 is an image folder. A second call
# continues what was interrupted.
set -eu
published=$1 data=$2 output=$3
search() { OMP_NUM_THREADS=1 python "$(dirname "$0")/search.py" "$published" "$data" "$output/searches" "$@"; }
search fast layer_wise layer_wise_1 &
search short layer_wise_2
wait $!
search
scales=$(for arm in published formula; do echo "$arm=$output/searches/$arm.safetensors"; done
    for arm in short fast layer_wise; do echo "$arm=$output/searches/$arm/scales.safetensors"; done)
trial() {
    name=$1 arms=$2
    shift 2
    repopt-timm trial repopt_vgg -c cifar10_trial --amp --amp-dtype bfloat16 --channels-last --data "$data" \
        --train-images 20000 --model-kwargs 'depths=(4,6,16,1)' 'widths=(16,32,64,128,512)' --epochs 8 \
        --warmup-epochs 2 --val-interval 4 --jobs 2 --threads 1 --arms repopt $arms --reference repopt --output "$output/$name" "$@"
}
trial search 'published formula short fast layer_wise' --seeds 2 --tuning-epochs 4 --scales $scales
trial search-lr0.1 'published formula short fast layer_wise' --seeds 2 --lr 0.1 --scales $scales
# What looked best there, from three searches, with other seeds.
trial search-again 'layer_wise layer_wise_1 layer_wise_2' --first-seed 2 --seeds 3 --lr 0.1 --scales \
    $(for arm in layer_wise layer_wise_1 layer_wise_2; do echo "$arm=$output/searches/$arm/scales.safetensors"; done)
repopt-timm trial --report "$output/search" "$output/search-lr0.1" "$output/search-again" --reference repopt \
    --output "$output/search-report"
