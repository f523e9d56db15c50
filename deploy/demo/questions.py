"""What the demo asks, one question for each topic that its corpus holds."""

from __future__ import annotations

QUESTIONS = (
    "How do I merge two DataFrames on a column and keep the rows without a match?",
    "Find the shortest path between two nodes of a weighted directed graph.",
    "How do I integrate a symbolic expression with respect to x?",
    "Compute the cumulative distribution function of a continuous random variable.",
    "Fit a random forest classifier and predict the class of each sample.",
    "How do I start a remote actor on a cluster with two GPUs?",
    "Create a chat completion with tools and a response format.",
    "Upload a folder to a repository on the model hub and create a commit.",
    "Resize an image and save it in another format.",
)
