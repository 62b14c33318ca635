"""The arithmetic of a ConvNeXt block, one module per implementation.

Every implementation is a function with the signature of
:func:`convnext_mm.ops.eager.block`, which is the definition of correct.
"""
