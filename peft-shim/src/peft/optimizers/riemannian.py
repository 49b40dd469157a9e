"""`peft.optimizers.riemannian`."""

from splice.methods.lora.riemannian import create_riemannian_optimizer as create_riemannian_optimizer
