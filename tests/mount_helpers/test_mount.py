"""mount.largefs, by the rules of mount(8), EXTERNAL HELPERS; with the real mount(8) and umount(8)."""

import subprocess
from pathlib import Path

import pytest

from tests.installed import CHECKOUT
from tests.mount_helpers.conftest import Shell

MOUNT = "mount -t largefs $PWD/store $PWD/mnt"


@pytest.mark.usefixtures("store")
class TestMount8:
    def test_mounts_and_is_usable_at_once(self, shell: Shell) -> None:
        said = shell(f"{MOUNT}; cat mnt/file; findmnt -no FSTYPE,SOURCE mnt; umount mnt; ls mnt")
        assert said.stdout.split() == ["text", "fuse.largefs", *said.stdout.split()[-1:]]
        assert said.stdout.split()[-1].endswith("/store")

    def test_nothing_is_said_without_v_and_the_route_with_it(self, shell: Shell) -> None:
        assert "route" in shell(f"{MOUNT} -v; umount mnt").stderr

    def test_options_reach_the_kernel(self, shell: Shell) -> None:
        said = shell(f"{MOUNT} -o ro,noexec,nodev; findmnt -no OPTIONS mnt; umount mnt").stdout
        assert {"ro", "noexec", "nodev"} <= set(said.strip().split(","))

    def test_suid_and_dev_are_the_defaults_as_mount8_has_it(self, shell: Shell) -> None:
        said = shell(f"{MOUNT}; findmnt -no OPTIONS mnt; umount mnt").stdout.strip().split(",")
        assert not {"nosuid", "nodev", "noexec"} & set(said)

    def test_umount_returns_when_the_store_is_free(self, shell: Shell) -> None:
        """64 MiB that are still to be summed up when umount is called."""
        again = "dd if=/dev/zero of=mnt/new bs=1M count=64 status=none; umount mnt; test ! -e store/owner"
        shell(f"{MOUNT}; {again}; {MOUNT}; {again}")

    def test_umount_by_type(self, shell: Shell) -> None:
        shell(f"{MOUNT}; umount -a -t fuse.largefs; ! findmnt mnt")

    def test_umount_of_a_mount_in_use(self, shell: Shell) -> None:
        said = shell(
            f"{MOUNT}; cd mnt; umount . || echo code $?; umount -l ../mnt; cd ..; ! findmnt mnt"
        )
        assert "busy" in said.stderr
        assert "code 1" in said.stdout or "code 32" in said.stdout

    def test_a_killed_daemon(self, shell: Shell) -> None:
        kill = "kill -9 $(grep -o '\"pid\": [0-9]*' store/owner | cut -d' ' -f2); sleep 0.2"
        said = shell(
            f"{MOUNT}; {kill}; ! cat mnt/file; umount mnt; {MOUNT}; cat mnt/file; umount mnt"
        )
        assert said.stdout == "text\n"

    def test_the_type_that_findmnt_shows_works_too(self, shell: Shell) -> None:
        shell("mount -t fuse.largefs $PWD/store $PWD/mnt; cat mnt/file; umount -t fuse.largefs mnt")

    def test_remount(self, shell: Shell) -> None:
        said = shell(
            f"{MOUNT}; mount -o remount,ro mnt; findmnt -no OPTIONS mnt; ! touch mnt/new;"
            "mount -o remount,rw mnt; touch mnt/new; mount -o remount,ro,hugetext=off mnt; umount mnt"
        )
        assert said.stdout.startswith("ro,")
        assert "Read-only file system" in said.stderr
        assert "for other options unmount and mount" in said.stderr

    def test_no_descriptor_of_the_caller_is_kept(self, shell: Shell) -> None:
        shell(f"exec 9>lock; flock 9; {MOUNT}; exec 9>&-; flock -n lock true; umount mnt")

    def test_relative_paths(self, shell: Shell) -> None:
        shell("/opt/largefs/bin/largefs mount store mnt; cat mnt/file; cd mnt; cd ..; umount mnt")

    def test_umount_through_a_symlink(self, shell: Shell) -> None:
        shell(f"ln -s mnt link; {MOUNT}; /opt/largefs/bin/largefs umount link; ! findmnt mnt")


@pytest.mark.usefixtures("store")
class TestFstab:
    def test_mount_all_twice(self, shell: Shell) -> None:
        options = "ro,nofail,noatime,_netdev,x-systemd.automount,X-any,hugetext=background"
        said = shell(
            f'echo "$PWD/store $PWD/mnt largefs {options} 0 0" >fstab;'
            "mount -T fstab -a; cat mnt/file; mount -v -T fstab -a; findmnt -no OPTIONS mnt; umount mnt"
        )
        assert "already mounted" in said.stdout
        assert "ro," in said.stdout

    def test_a_symlink_for_a_store_is_known_again(self, shell: Shell) -> None:
        said = shell(
            'ln -s store link; echo "$PWD/link $PWD/mnt largefs defaults 0 0" >fstab;'
            "mount -T fstab -a; mount -v -T fstab -a; umount mnt"
        )
        assert "already mounted" in said.stdout

    def test_noauto(self, shell: Shell) -> None:
        shell(
            'echo "$PWD/store $PWD/mnt largefs noauto 0 0" >fstab; mount -T fstab -a; ! findmnt mnt'
        )

    def test_names_with_blanks_commas_and_backslashes(self, shell: Shell) -> None:
        said = shell(
            r"""
            mv store 'a, b\c'; mv mnt 'm n'
            echo "$PWD/a,\\040b\\134c $PWD/m\\040n largefs defaults 0 0" >fstab
            mount -T fstab -a; cat 'm n/file'; findmnt -no SOURCE "$PWD/m n"; umount "$PWD/m n"
            """
        )
        assert "text\n" in said.stdout
        assert r"/a, b\c" in said.stdout

    def test_an_ordinary_user_mounts_and_unmounts(self, shell: Shell, here: Path) -> None:
        nobody = "setpriv --reuid 65534 --regid 65534 --clear-groups --"
        if subprocess.run([*nobody.split(), "test", "-x", CHECKOUT / ".venv/bin"]).returncode:
            pytest.skip("the checkout is in a directory that ordinary users may not enter")
        for parent in here.parents[:3]:
            parent.chmod(0o755)  # pytest's
        here.chmod(0o755)
        said = shell(
            f"""
            chown -R 65534:65534 store mnt
            echo "$PWD/store $PWD/mnt largefs noauto,user 0 0" >fstab; mount --bind fstab /etc/fstab
            mknod fuse c 10 229; chmod 666 fuse; mount --bind fuse /dev/fuse
            {nobody} mount $PWD/mnt; {nobody} cat mnt/file; findmnt -no OPTIONS mnt
            {nobody} umount $PWD/mnt; ! findmnt mnt
            """
        )
        assert "text\n" in said.stdout
        assert "user_id=65534" in said.stdout


@pytest.mark.usefixtures("store")
class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "code", "says"),
        [
            ("$PWD/none $PWD/mnt", 32, "none"),
            ("$PWD/from $PWD/mnt", 32, "from"),
            ("$PWD/store $PWD/none", 32, "no such directory"),
            ("$PWD/store $PWD/from/file", 32, "not a directory"),
            ("$PWD/store $PWD/mnt -o bogus=1", 1, "bogus=1"),
            ("$PWD/store $PWD/mnt -o commit=never", 1, "commit=never"),
            ("$PWD/store $PWD/mnt -N /proc/1/ns/mnt", 1, "nsenter"),
            ("$PWD/store $PWD/mnt -x", 1, "-x"),
            ("$PWD/store $PWD/mnt more", 1, "more"),
            ("$PWD/store", 1, "no mountpoint"),
            ("", 1, "usage"),
        ],
    )
    def test_exit_code_and_one_line(
        self, shell: Shell, arguments: str, code: int, says: str
    ) -> None:
        said = shell(f"mount.largefs {arguments}", code=code).stderr
        assert says in said
        assert said.count("\n") == 1, said

    def test_a_store_in_use(self, shell: Shell) -> None:
        said = shell(
            f"{MOUNT}; mkdir two; mount -t largefs $PWD/store two || echo code $?; umount mnt"
        )
        assert said.stdout == "code 32\n"
        assert "mounted at" in said.stderr

    def test_fake(self, shell: Shell) -> None:
        shell(
            f"{MOUNT} -f; ! findmnt mnt; ! mount -f -t largefs /none $PWD/mnt; ! {MOUNT} -f -o bogus"
        )

    def test_sloppy(self, shell: Shell) -> None:
        shell(f"{MOUNT} -s -o bogus; umount mnt")

    def test_without_largefs(self, shell: Shell) -> None:
        copy = f"cp {CHECKOUT}/mount-helpers/mount.largefs .; ./mount.largefs store mnt"
        assert "not installed" in shell(copy, code=2).stderr

    def test_largefs_from_path(self, shell: Shell) -> None:
        shell(
            f"cp {CHECKOUT}/mount-helpers/*.largefs .; export PATH=/opt/largefs/bin:$PATH;"
            "./mount.largefs store mnt; cat mnt/file; ./umount.fuse.largefs mnt"
        )
