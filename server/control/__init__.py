"""The control process: Ray, the controller, the workers, and the change of what they serve."""
