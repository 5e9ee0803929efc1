"""Learn an encoder from the images of a bucket, without labels.

    selective-ray submit pretrain \\
        --images s3://BUCKET/images --run s3://BUCKET/runs/encoder --preset moco-v2-imagenet

The same by Ray's own command, from a checkout:

    ray job submit --working-dir . -- python jobs/pretraining.py \\
        --images s3://BUCKET/images --run s3://BUCKET/runs/encoder --preset moco-v2-imagenet
"""

import sys

from selective_ray.cli import app

if __name__ == "__main__":
    app(["pretrain", *sys.argv[1:]])
