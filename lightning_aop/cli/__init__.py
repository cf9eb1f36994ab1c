"""The sub-commands of `lightning-aop` that are no LightningCLI's: a file each, and what they share."""
