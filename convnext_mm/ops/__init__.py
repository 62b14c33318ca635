"""The arithmetic of a ConvNeXt block.

Every implementation (:mod:`.eager`, :mod:`.lean`, :mod:`.triton`) has a function
with the signature of :func:`convnext_mm.ops.eager.block`, which is the definition
of correct.
"""
