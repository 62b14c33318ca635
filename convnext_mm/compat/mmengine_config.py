"""Where MMEngine finds the configs of a package."""

from mmengine.config import utils

# MMEngine looks for the bases of an `mmseg::` config in a distribution called
# mmsegmentation; the maintained one is called onedl-mmsegmentation. By the name
# of the module either is found, as it does for mmdet.
utils.MODULE2PACKAGE['mmseg'] = 'mmseg'
