"""The build backend's hook: put the compiled C core into the wheel, and tag the wheel for it."""

import importlib.util
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompiledCore(BuildHookInterface):
    """Run build_ext.build before hatchling collects the files of a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile in place for an editable installation, else into the wheel."""
        # The backend does not put the project's folder on sys.path.
        spec = importlib.util.spec_from_file_location("build_ext", Path(self.root, "build_ext.py"))
        build_ext = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build_ext)

        package = Path(self.root, "refquant", "kernels")
        if version == "editable":
            build_ext.build(package, required=build_ext.required())
            return

        for file in self.tutorials():  # `refquant tutorials` reads them; a source tree has them beside the package
            build_data["force_include"][str(file)] = f"refquant/assets/{file.relative_to(self.root).as_posix()}"

        self._scratch = tempfile.TemporaryDirectory()  # lives until the wheel is written
        compiled = build_ext.build(Path(self._scratch.name), required=build_ext.required())
        if compiled is None:
            return  # pure NumPy: the backend's own tag, py3-none-any, is right
        build_data["force_include"][str(compiled)] = f"refquant/kernels/{compiled.name}"
        build_data["pure_python"] = False
        if build_ext.STABLE_ABI:
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"cp310-abi3-{platform}"
        else:
            build_data["infer_tag"] = True

    def tutorials(self) -> list[Path]:
        """List the scripts of the tutorials, the results they read, and their rendered pages."""
        folder, wanted = Path(self.root, "tutorials"), ("[0-9][0-9]_*.py", "data/*", "rendered/[0-9][0-9]_*")
        return sorted(file for pattern in wanted for file in folder.glob(pattern))

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the temporary folder once its file is in the wheel."""
        if hasattr(self, "_scratch"):
            self._scratch.cleanup()
