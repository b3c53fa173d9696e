# SPDX-License-Identifier: Apache-2.0
"""Started in each of the cluster's Python processes: notes the largest elements that a Beam worker sends.

All that leaves a worker (for a shuffle, another stage, another environment) is written to an output stream of Beam's
data plane, which asks after each element whether it is time to send.
"""

import os
import sys

if "apache_beam.runners.worker.sdk_worker_main" in sys.orig_argv:
    from apache_beam.runners.worker import data_plane

    largest = 0

    def watch(stream: type) -> None:
        maybe_flush = stream.maybe_flush  # type: ignore[attr-defined]

        def watched(self):  # type: ignore[no-untyped-def]
            global largest
            size = self.size() - getattr(self, "size_before", 0)
            if size > largest:
                largest = size
                with open(os.environ["ELEMENT_SIZES"], "a") as file:
                    file.write(f"{size}\n")
            maybe_flush(self)
            self.size_before = self.size()

        stream.maybe_flush = watched  # type: ignore[attr-defined]

    watch(data_plane.SizeBasedBufferingClosableOutputStream)
