"""Reading images and data sets."""

from cfvit.data.datasets import (
    DataSource,
    StoredImages,
    difference_of_classes,
    has_validation_split,
    have_one_order,
    open_data,
    open_images,
    readable_class_names,
    split_holdout,
)
from cfvit.data.images import MAX_PIXELS, ImageError, eval_transform, open_image
from cfvit.data.loading import (
    FAILURES_IN_A_ROW,
    UNREADABLE,
    EvalImages,
    TrainImages,
    TrainSampler,
    combine_seeds,
    eval_loader,
    hold,
    leave_signals_to_the_run,
    next_batch,
    progress_bar,
    train_loader,
)
from cfvit.data.trees import find_images, iter_images, natural_key
