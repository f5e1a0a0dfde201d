"""The version, apart, so that the build can read it without importing anything."""

__version__ = "0.1.0"
ZOO_PLUGIN_API = 1
"""Version of the plugin contracts; a plugin module may state the one it was written for."""
