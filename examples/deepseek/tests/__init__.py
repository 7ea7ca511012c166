"""Tests of the DeepSeek example."""
