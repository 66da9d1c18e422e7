"""Rollout, adjoint sweep and gradient estimators; takes `backward` as a callable and knows no engine."""
