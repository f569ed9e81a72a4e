# The kernel-mode part: enter user mode, help it write ports, and hand it its faults.
#
# It is this small because a hypervisor without hardware support interprets kernel-mode instructions
# one by one, at about a microsecond each, while user mode runs natively. So all tables are constants
# of the image: page tables, GDT, IDT and TSS are ready before the first instruction. Descriptors have
# their addresses split into pieces no linker relocation exists for; `x - boot_base` is a constant of
# the assembler, and boot_base is a multiple of 64 KiB, so that it is the low 16 bits of x.

.set KERNEL_CODE, 0x10
.set USER_DATA, 0x20 | 3
.set USER_CODE, 0x28 | 3
.set TASK, 0x30
.set BASE_HIGH, {image_address} >> 16
.set PRESENT_WRITABLE_USER, 0x07
.set LARGE_PAGE, 0x80

.section .boot, "awx", @progbits
.globl boot_base
boot_base:

# Linux 64-bit boot protocol: CPL 0, identity mapping, RSI = boot_params.
.globl boot_entry
boot_entry:
    cli
    mov eax, 0x620                      # PAE, OSFXSR, OSXMMEXCPT; no SMEP, SMAP: pages are the user's
    mov cr4, rax
    mov esp, offset kernel_stack_end
    mov eax, offset page_map
    mov cr3, rax
    lgdt [gdt_pointer]
    lidt [idt_pointer]
    mov eax, TASK
    ltr ax
    mov rax, cr0
    and eax, 0xfffffff3                 # EM, TS off: SSE without faults
    or eax, 2                           # MP
    mov cr0, rax
    mov rdi, rsi
    mov eax, offset user_start
    mov r8d, offset user_stack_end - 8  # as after a call
enter_user:
    push USER_DATA
    push r8
    push 0x3002                         # RFLAGS: port writes allowed; interrupts off, none come
    push USER_CODE
    push rax
    iretq

# A port access that faulted in user mode, because the hypervisor knows no I/O privilege level: do it
# here. The fault pushed an error code; on with the instruction after the access, which is one byte.
protection_fault:
    push rax
    mov rax, [rsp + 16]
    cmp byte ptr [rax], 0xef            # out dx, eax
    je 1f
    cmp byte ptr [rax], 0xec            # in al, dx
    je 4f
    cmp byte ptr [rax], 0xed            # in eax, dx
    je 5f
    cmp byte ptr [rax], 0xee            # out dx, al
    jne 2f
    pop rax
    out dx, al
    jmp 3f
4:  pop rax
    in al, dx
    jmp 3f
5:  pop rax
    in eax, dx
    jmp 3f
1:  pop rax
    out dx, eax
3:  add rsp, 8
    inc qword ptr [rsp]
    iretq
2:  pop rax
    push 13

# Faults: on in user mode as user_fault(vector, error code, rip, address). A second one ends it all.
fault:
    cmp byte ptr [faulted], 0
    jne dead
    mov byte ptr [faulted], 1
    pop rdi
    pop rsi
    pop rdx
    mov rcx, cr2
    mov esp, offset kernel_stack_end
    mov eax, offset user_fault
    mov r8d, offset fault_stack_end - 8
    jmp enter_user
dead:
    mov edx, {pvpanic}
    mov eax, {pvpanic_panicked}
    out dx, al
1:  hlt
    jmp 1b

# 8, 10..14, 17, 21, 29 and 30 push an error code.
.set ERROR_CODE_VECTORS, 0x60227d00
.altmacro
.macro fault_entry vector
fault_\vector:
    .if \vector == 13
    jmp protection_fault
    .endif
    .if !((ERROR_CODE_VECTORS >> \vector) & 1)
    push 0
    .endif
    push \vector
    jmp fault
.endm
.macro gate handler, flags
    .word \handler - boot_base, KERNEL_CODE
    .byte 0, \flags
    .word BASE_HIGH
    .long 0, 0
.endm
.macro fault_gate vector
    gate fault_\vector, 0x8e
.endm

.set vector, 0
.rept 32
    fault_entry %vector
    .set vector, vector + 1
.endr

.balign 16
idt:
.set vector, 0
.rept 32
    fault_gate %vector
    .set vector, vector + 1
.endr
idt_end:

gdt:
    .quad 0, 0
    .quad 0x00af9b000000ffff            # 0x10 kernel code
    .quad 0x00cf93000000ffff            # 0x18 kernel data
    .quad 0x00cff3000000ffff            # 0x20 user data
    .quad 0x00affb000000ffff            # 0x28 user code
    .word 103, task - boot_base         # 0x30 task state
    .byte BASE_HIGH, 0x89, 0, 0
    .quad 0
gdt_end:

.balign 8
task:
    .long 0
    .quad kernel_stack_end
    .fill 90, 1, 0
    .word 104                           # no I/O bitmap

gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word idt_end - idt - 1
    .quad idt

faulted:
    .byte 0

# The first GiB, in large pages; user mode adds the rest, where there is more.
.balign 4096
page_map:
    .quad page_directories + PRESENT_WRITABLE_USER
    .fill 511, 8, 0
.globl page_directories
page_directories:
    .quad first_directory + PRESENT_WRITABLE_USER
    .fill 511, 8, 0
first_directory:
.set address, 0
.rept 512
    .quad address + PRESENT_WRITABLE_USER + LARGE_PAGE
    .set address, address + 0x200000
.endr

.section .bss.stacks, "aw", @nobits
.balign 4096
    .skip 4096
kernel_stack_end:
    .skip 16384
fault_stack_end:
    .skip 131072                        # three histograms of 15 KiB are built and moved here
user_stack_end:
