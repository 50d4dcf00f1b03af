"""The file for `--external_plugins`: `moelora path ms-swift` prints where it is."""

from moelora_plugin.integrations.ms_swift import register

register()
