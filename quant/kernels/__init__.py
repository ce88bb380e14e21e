"""Accelerator kernels, one file each; the reference of each stands in its scheme's file."""
