"""List the images of a bucket and embed them.

    selective-ray submit embed --config jobs/configs/imagenet.toml \\
        --images s3://BUCKET/images --run s3://BUCKET/runs/one

The same by Ray's own command, from a checkout:

    ray job submit --working-dir . -- python jobs/embedding.py --config jobs/configs/imagenet.toml \\
        --images s3://BUCKET/images --run s3://BUCKET/runs/one
"""

import sys

from selective_ray.cli import app

if __name__ == "__main__":
    app(["embed", *sys.argv[1:]])
