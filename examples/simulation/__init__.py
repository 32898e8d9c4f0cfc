"""An experiment for `qgc simulate`: `text.toml`, and the tasks that it names."""
